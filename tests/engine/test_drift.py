"""A merge asks every layer whether it still answers as it did."""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.core.errors import CheckError
from burnish.testing import stir
from burnish.testing.models import tiny


@pytest.mark.parametrize("recipe", ["lora(rank=4)", "dora(rank=4)", "snella(rank=4)",
                                    "nf4 + lora(rank=4)", "vera(rank=8)", "ia3", "full"])
@pytest.mark.parametrize("model, dtype", [("llama", torch.float32), ("gpt2", torch.float32),
                                          ("vit", torch.bfloat16), ("llama", torch.bfloat16)])
def test_sound_merges_pass(recipe, model, dtype):
    net, batch = tiny(model, dtype=dtype)
    tuned = burnish.tune(net, recipe)
    stir(tuned, size=0.1)
    modes = [m.training for m in net.modules()]
    tuned.merge()
    tuned.unmerge()
    assert [m.training for m in net.modules()] == modes


def test_a_merge_that_drifts_is_refused_and_nothing_is_changed(monkeypatch):
    net, batch = tiny("llama")
    tuned = burnish.tune(net, "lora(rank=4)")
    stir(tuned, size=0.1)
    net.eval()
    want = net(**batch).logits
    base = {n: p.detach().clone() for n, p in net.named_parameters()}
    from burnish.blocks.weight.factor import Chain

    monkeypatch.setattr(Chain, "dense", lambda self: 2 * self.scale * self.B @ self.A)
    with pytest.raises(CheckError, match=r"layers.0.self_attn.q_proj answers otherwise") as e:
        tuned.merge()
    assert e.value.exit_code == 4 and "\n" not in str(e.value)
    assert tuned.merged is None
    assert torch.equal(net(**batch).logits, want)
    assert all(torch.equal(base[n], p) for n, p in net.named_parameters())


def test_convolutions_and_embeddings_are_asked_too(monkeypatch):
    for model, targets in (("cnn", "conv"), ("gpt2", "position")):
        net, batch = tiny(model)
        tuned = burnish.tune(net, "lora(rank=2)", targets=targets, head=False)
        stir(tuned, size=0.1)
        from burnish.blocks.weight.factor import Chain

        with monkeypatch.context() as m:
            m.setattr(Chain, "dense", lambda self: 3 * self.scale * self.B @ self.A)
            if model == "gpt2":                      # rows are looked up, not formed densely
                with pytest.raises(CheckError, match="answers otherwise"):
                    tuned.merge()
        tuned.merge()
        tuned.unmerge()
