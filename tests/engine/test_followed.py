"""A tuned model that torch.export or torch.jit.trace follows answers what it answers itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.weight import quantise
from burnish.testing.checks.common import part
from burnish.testing.models import tiny
from burnish.testing.stir import stir

RECIPES = ["lora(rank=2)", "snella(rank=2)", "nf4 + dora(rank=2)", "houlsby", "ia3", "full"]


def made(model, recipe):
    net, batch = tiny(model)
    net.config.use_cache = False
    stir(burnish.tune(net, recipe))
    net.eval()
    batch.pop("labels", None)
    with torch.no_grad():
        return net, batch, net(**batch).logits


@pytest.mark.parametrize("model, recipe", [*(("bert", r) for r in RECIPES),
                                           ("vit", "vpt(length=2)"), ("vit", "snella(rank=2)"),
                                           ("llama", "prefix(length=2)"), ("vit", "adaptformer"),
                                           ("gpt2", "lora(rank=2)")])
def test_export(model, recipe):
    """Listeners and taps, which no graph of a compiler holds, are followed where they run."""
    net, batch, want = made(model, recipe)
    with torch.no_grad():
        followed = torch.export.export(net, (), batch, strict=False).module()
        assert torch.allclose(followed(**batch).logits, want, atol=1e-5)
        assert torch.allclose(net(**batch).logits, want, atol=1e-6)     # and it is as it was
        other = {k: v.flip(0) for k, v in batch.items()}
        assert torch.allclose(followed(**other).logits, net(**other).logits, atol=1e-5)


@pytest.mark.parametrize("storage", ["nf4", "int8", "fp8"])
def test_a_program_holds_all_pieces_of_a_weight_that_is_decoded(storage, monkeypatch):
    """A simulation decodes the first piece alone, and its tensors look like those of an export."""
    monkeypatch.setattr(quantise, "PIECE", 1 << 10)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    stir(burnish.tune(net, f"{storage} + lora(rank=2)", head=False))
    x = torch.randn(3, 64)
    with torch.no_grad():
        followed = torch.export.export(net, (x,), strict=False).module()
        assert torch.allclose(followed(x), net(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")          # sizes are constants
@pytest.mark.parametrize("recipe", [r.removeprefix("nf4 + ") for r in RECIPES])
def test_trace(recipe):
    """(torch.jit cannot trace a tensor seen as another dtype, as codes are.)"""
    net, batch, want = made("bert", recipe)
    net.config.return_dict = False
    words = batch["input_ids"], torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        traced = torch.jit.trace(net, words, check_trace=False)
        assert torch.allclose(traced(*words)[0], want, atol=1e-5)
        other = tuple(w.flip(0) for w in words)
        assert torch.allclose(traced(*other)[0], net(*other)[0], atol=1e-5)


@pytest.mark.parametrize("recipe", ["shira(rank=4)", part("dsee")])
def test_few_entries_stand_in_the_columns_they_had(recipe):
    """An export puts tensors without values in the place of the entries' numbers."""
    net, batch = tiny("vit")
    tuned = stir(burnish.tune(net, recipe, head=False))
    net.eval()
    batch.pop("labels")
    with torch.no_grad():
        followed = torch.export.export(net, (), batch, strict=False).module()
        want = net(**batch).logits
        assert torch.allclose(followed(**batch).logits, want, atol=1e-5)
        with tuned.disabled():
            assert not torch.allclose(want, net(**batch).logits, atol=1e-4)
