"""Magnitude pruning: the smallest entries of frozen weights are zero."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.blocks.weight.factor import Chain
from burnish.core.errors import RecipeError, TargetError
from burnish.core.recipe import parse
from burnish.testing import follows, tiny


def without_lowest(rows, k):
    """Each row without its k smallest entries, in plain Python."""
    out = rows.detach().clone()
    for row in out:
        for i in sorted(range(len(row)), key=lambda i: abs(float(row[i])))[:k]:
            row[i] = 0
    return out


def made(settings, more="lora(rank=2, alpha=6)", inp=12):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inp, 10)).double()
    W = net[0].weight.detach().clone()
    tuned = burnish.tune(net, f"magnitude({settings}) + {more}", head=False, targets="0")
    return net, tuned, W


@pytest.mark.parametrize("settings, k", [("ratio=0.5", 6), ("ratio=0.3", 3), ("", 6)])
def test_outputs_and_gradients_are_those_of_the_equation(settings, k):
    net, tuned, W = made(settings)
    bias = net[0].bias.detach()
    ((_, term),) = tuned.terms(Chain)
    term.double()
    nn.init.normal_(term.B)
    pruned = without_lowest(W, k)
    assert torch.equal(net[0].weight, pruned)
    follows(tuned, lambda x, A, B: F.linear(x, pruned + 3 * B @ A, bias), [term.A, term.B],
            (5, 3, 12))
    tuned.detach()
    assert torch.equal(net[0].weight, W)


def test_whole_matrices_and_patterns():
    net, _, W = made("mask='matrix', ratio=0.7")
    assert torch.equal(net[0].weight.view(1, -1), without_lowest(W.view(1, -1), 84))
    net, _, W = made("mask='2:4'")
    assert torch.equal(net[0].weight, without_lowest(W.view(-1, 4), 2).view(10, 12))


@pytest.mark.parametrize("model, name", [("gpt2", "h.0.mlp.c_fc"), ("mixtral", "experts"),
                                         ("cnn", "")])
def test_a_row_is_an_output_however_it_is_stored(model, name):
    from burnish.core.anatomy import Anatomy

    net, _ = tiny(model)
    base = copy.deepcopy(net)
    burnish.tune(net, "magnitude + lora(rank=1)", head=False)
    held = [p for p in Anatomy.of(base).places if name in p.path and p.kind != "linear"]
    assert held
    for p in held:
        was = p.view(p.stored(base.get_submodule(p.path)))
        now = p.view(p.stored(net.get_submodule(p.path)))
        assert torch.equal(now.flatten(0, -2), without_lowest(was.flatten(0, -2), p.inp // 2))


def test_a_kernel_in_channels_last():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    W = net[0].weight.detach().clone()
    burnish.tune(net, "magnitude + lora(rank=2)", head=False, targets="0")
    assert torch.equal(net[0].weight.flatten(1), without_lowest(W.flatten(1), 18))


def test_a_transposed_kernel():
    """Stored (in, out, kernel): an output's row is W[:, o]."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(4, 6, 3))
    W = net[0].weight.detach().clone()
    burnish.tune(net, "magnitude + lora(rank=2)", head=False, targets="0")
    want = without_lowest(W.transpose(0, 1).flatten(1), 6).view(6, 4, 3).transpose(0, 1)
    assert torch.equal(net[0].weight, want)


def test_the_head_stays_and_what_cannot_act_is_refused():
    net, _ = tiny("vit")
    head = net.classifier.weight.detach().clone()
    burnish.tune(net, "magnitude(targets='all-linear, head') + lora(rank=2, targets='q')",
                 head=False)
    assert torch.equal(net.classifier.weight, head)
    for text, why in (("ratio=0.0", "above 0 and below 1"), ("ratio=1.0", "above 0 and below 1"),
                      ("mask='4:2'", "expected 'row'"),
                      ("mask='2:4', ratio=0.3", "ratio does nothing beside mask='2:4'")):
        with pytest.raises(RecipeError, match=why):
            parse(f"magnitude({text})")
    with pytest.raises(TargetError, match="runs of 4 inputs do not tile 0.weight, which has 10"):
        made("mask='2:4'", inp=10)
    with pytest.raises(RecipeError, match="the grid of the stored weights"):
        burnish.tune(tiny("vit")[0], "magnitude + nf4 + lora(rank=2)")
    assert parse("magnitude")[0].settings() == {"targets": None, "ratio": 0.5, "mask": "row"}


def test_a_file_finds_the_mask_again(tmp_path):
    net, batch = tiny("llama")
    base = copy.deepcopy(net)
    tuned = burnish.tune(net, "magnitude(ratio=0.6) + lora(rank=2)", head=False)
    net.eval()
    tuned.save(tmp_path / "a")
    assert not [k for k in tuned.tensors() if "provided" in k]
    burnish.load(base, tmp_path / "a")
    base.eval()
    assert torch.equal(base(**batch).logits, net(**batch).logits)


def test_half_precision_compares_in_single():
    net = nn.Sequential(nn.Linear(8, 4)).bfloat16()
    W = net[0].weight.detach().clone()
    burnish.tune(net, "magnitude + lora(rank=2)", head=False, targets="0")
    assert torch.equal(net[0].weight, without_lowest(W, 4)) and net[0].weight.dtype == W.dtype
