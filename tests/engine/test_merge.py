"""Merging into plain weights and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import CheckError, ConfigError
from burnish.engine import merge as merging
from burnish.engine import originals
from burnish.engine.slot import slots
from burnish.testing import stir
from burnish.testing.models import tiny

RECIPES = ["lora(rank=4)", "dora(rank=4)", "pissa(rank=4)", "miss(rank=4)", "snell(rank=4)",
           "snella(rank=4)", "shira(rank=2)", "adalora(rank=2, init_rank=4)", "bitfit", "norms",
           "full", "ia3", "lora(rank=4) + snella(rank=4)", "nf4 + lora(rank=4)"]


def stirred(recipe, model="vit", **kw):
    net, batch = tiny(model, **kw)
    tuned = burnish.tune(net.eval(), recipe)
    net.eval()
    return stir(tuned, size=0.1), batch


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", ["vit", "gpt2", "timm_qkv"])
def test_the_merged_model_is_plain_and_the_same(recipe, model):
    tuned, batch = stirred(recipe, model)
    names = [n for n in tiny(model)[0].state_dict()]
    want = logits(tuned.model, batch)
    tensors = {n: t.clone() for n, t in tuned.model.state_dict().items()
               if isinstance(t, torch.Tensor)}
    flags = {n: p.requires_grad for n, p in tuned.model.named_parameters()}
    merged = tuned.merge()
    torch.testing.assert_close(logits(merged, batch), want, rtol=1e-5, atol=1e-5)
    assert not list(slots(merged)) and not any(p.requires_grad for p in merged.parameters())
    if "ia3" not in recipe:                       # a scaling of outputs may need a bias
        assert list(merged.state_dict()) == names
    assert [type(m) for m in merged.modules()] == [type(m) for m in tiny(model)[0].modules()]
    tuned.unmerge()
    after = tuned.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in tensors.items())
    assert flags == {n: p.requires_grad for n, p in tuned.model.named_parameters()}
    assert torch.equal(logits(tuned.model, batch), want)


@pytest.mark.parametrize("kind", ["cnn", "encoder", "mha", "mixtral", "mamba"])
def test_other_kinds_of_weights_merge(kind):
    tuned, batch = stirred("lora(rank=4)", kind)
    want = logits(tuned.model, batch)
    torch.testing.assert_close(logits(tuned.merge(), batch), want, rtol=1e-4, atol=1e-5)


def test_a_half_precision_weight_is_rounded_once():
    """W + Delta in fp32, cast at the end; and the way back restores every bit."""
    net, _ = tiny("llama", dtype=torch.bfloat16)
    tuned = burnish.tune(net, "lora(rank=4)", targets="q")
    q = net.model.layers[0].self_attn.q_proj
    before = q.weight.clone()
    term = next(t for n, t in tuned.terms(nn.Module) if n.startswith("model.layers.0."))
    nn.init.normal_(term.B)
    want = (before.float() + term.dense().detach()).bfloat16()
    tuned.merge()
    assert torch.equal(q.weight, want)
    tuned.unmerge()
    assert torch.equal(q.weight, before)


def test_large_weights_wait_on_disk(monkeypatch):
    monkeypatch.setattr(originals, "IN_MEMORY", 64)
    tuned, batch = stirred("full")
    assert all(not isinstance(v, torch.Tensor) or v.nbytes <= 64
               for v in tuned.originals.kept.values())
    tuned.detach()
    for a, b in zip(tuned.model.parameters(), tiny("vit")[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_detach_after_merge_gives_the_base():
    tuned, batch = stirred("lora(rank=4) + bitfit")
    tuned.merge()
    tuned.detach()
    base, _ = tiny("vit")
    for (n, a), b in zip(tuned.model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad, n


def test_training_goes_on_after_unmerge():
    tuned, batch = stirred("lora(rank=4)")
    tuned.optimizer(lr=1e-2)
    tuned.step(batch)
    tuned.merge()
    tuned.unmerge()
    first = tuned.step(batch)
    for _ in range(5):
        last = tuned.step(batch)
    assert last < first


@pytest.mark.parametrize("call", [
    lambda t, b, f: t.merge(), lambda t, b, f: t.step(b), lambda t, b, f: t.use("default"),
    lambda t, b, f: t.add("other", "lora"), lambda t, b, f: t.save(f / "a"),
    lambda t, b, f: t.disabled().__enter__(),
], ids=["merge", "step", "use", "add", "save", "disabled"])
def test_what_makes_no_sense_on_merged_weights_says_so(call, tmp_path):
    tuned, batch = stirred("lora(rank=4)")
    merged = tuned.merge()
    want = logits(merged, batch)
    with pytest.raises(ConfigError, match="merged"):
        call(tuned, batch, tmp_path)
    assert torch.equal(logits(merged, batch), want)
    assert not list(tmp_path.iterdir())
    tuned.unmerge()
    with pytest.raises(ConfigError, match="nothing is merged"):
        tuned.unmerge()


@pytest.mark.parametrize("recipe, word", [("houlsby(bottleneck=4)", "houlsby"),
                                          ("vpt", "vpt"), ("lst(reduction=4)", "lst")])
def test_what_has_no_form_as_a_weight_is_refused_by_name(recipe, word):
    tuned, batch = stirred(recipe)
    with pytest.raises(CheckError, match=f"cannot merge: {word}") as e:
        tuned.merge()
    assert e.value.exit_code == 4
    assert list(slots(tuned.model)), "still tuned"


def test_a_merge_that_fails_half_way_changes_nothing(monkeypatch):
    tuned, batch = stirred("lora(rank=4)")
    want = logits(tuned.model, batch)
    real, calls = merging._merged, []

    def fails(module, slot, active):
        calls.append(module)
        if len(calls) == 8:
            raise CheckError("the eighth")
        return real(module, slot, active)

    monkeypatch.setattr(merging, "_merged", fails)
    with pytest.raises(CheckError, match="the eighth"):
        tuned.merge()
    assert torch.equal(logits(tuned.model, batch), want)
    assert tuned.merged is None


def test_a_scaling_merges_whole_or_not_at_all():
    tuned, batch = stirred("ia3")
    want = logits(tuned.model, batch)
    tuned.use({"default": 0.5})
    with pytest.raises(CheckError, match="folds only whole"):
        tuned.merge()
    tuned.use("default")
    assert torch.equal(logits(tuned.model, batch), want)
