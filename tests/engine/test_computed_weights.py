"""Weights that a module computes from other tensors (weight_norm and its like): findings 3.3."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

import burnish
from burnish.core.errors import TargetError

KINDS = {"weight_norm": parametrizations.weight_norm, "spectral": parametrizations.spectral_norm,
         "orthogonal": parametrizations.orthogonal, "old weight_norm": weight_norm}


class Net(nn.Module):
    def __init__(self, kind, conv):
        super().__init__()
        self.a = KINDS[kind](nn.Conv1d(4, 6, 3) if conv else nn.Linear(4, 6))
        self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x)
        return self.head(torch.tanh(self.b(y.mean(-1) if y.dim() == 3 else y)))


@pytest.fixture(params=[False, True], ids=["linear", "conv"])
def conv(request):
    return request.param


def made(kind, conv):
    torch.manual_seed(0)
    net = Net(kind, conv).eval()
    return net, torch.randn(5, 4, 7) if conv else torch.randn(5, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["lora(rank=2)", "dora(rank=2)", "nf4 + lora(rank=2)"])
def test_a_named_one_is_refused_with_the_way_out(kind, recipe, conv):
    net, _ = made(kind, conv)
    with pytest.raises(TargetError, match="computes its weight.*remove_parametrizations"):
        burnish.tune(net, recipe, targets="a", head=False)
    assert not any(".burnish" in f".{n}" for n, _ in net.named_modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["lora(rank=2)", "nf4 + lora(rank=2)", "full"])
def test_others_are_tuned_and_merged_beside_it(kind, recipe, conv):
    net, x = made(kind, conv)
    start = net(x)
    tuned = burnish.tune(net, recipe, targets=None if recipe == "full" else "b", head=False)
    net.eval()
    assert "computes its weight" in repr(tuned)
    with torch.no_grad():
        for i, p in enumerate(tuned.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    want = net(x)
    assert not torch.allclose(want, start)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    torch.testing.assert_close(net(x), want, rtol=0, atol=0)
    tuned.detach()
    torch.testing.assert_close(net(x), start, rtol=0, atol=0)


def test_made_plain_it_is_a_place_like_any_other():
    net, x = made("weight_norm", False)
    parametrize.remove_parametrizations(net.a, "weight")
    tuned = burnish.tune(net, "lora(rank=2)", targets="a", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    want = net(x)
    torch.testing.assert_close(tuned.merge()(x), want, rtol=1e-5, atol=1e-5)


def test_all_weights_of_a_speech_encoder():
    """Wav2Vec2's positional convolution is computed: `targets="all"` leaves it out, by name."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    net = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=8,
        num_labels=3))
    tuned = burnish.tune(net, "lora(rank=1)", targets="all")
    assert "pos_conv_embed.conv computes its weight" in repr(tuned)
    batch = {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])}
    assert torch.isfinite(tuned.step(batch))
