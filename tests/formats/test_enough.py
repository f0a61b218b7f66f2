"""A file is enough: what starts and storages decided is in it, and nothing is decided again."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file

import burnish
from burnish.core import registry
from burnish.engine.slot import slots
from burnish.testing import choose, conformance
from burnish.testing.checks.common import keyed, logits
from burnish.testing.models import tiny

METHODS = choose.visited(sorted(n for n in registry.names(extra=False) if conformance.TRAINS & set(
    registry.find(n).axes()) or "storage" in registry.find(n).axes()))


def flipped(real, name):
    """Another basis that is as right: signs of every second vector turned round."""
    def decompose(A, *args, **kw):
        U, S, V = real(A, *args, **kw)
        sign = torch.where(torch.arange(S.shape[-1]) % 2 == 0, -1.0, 1.0).to(S)
        if name == "svd_lowrank":
            return U * sign, S, V * sign
        return torch.return_types.linalg_svd((U * sign, S, sign.unsqueeze(-1) * V))
    return decompose


@contextlib.contextmanager
def another_machine(monkeypatch):
    """Other random draws, and another choice wherever a decomposition leaves one."""
    with monkeypatch.context() as m, torch.random.fork_rng([]):
        torch.manual_seed(987)
        for home, name in ((torch, "svd_lowrank"), (torch.linalg, "svd")):
            m.setattr(home, name, flipped(getattr(home, name), name))
        yield


def trained(recipe, model, **kw):
    net, batch = tiny(model, **kw)
    batch = keyed(batch, recipe)
    tuned = burnish.tune(net.eval(), recipe, calibration=[batch])
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    return tuned, batch


def comes_back(recipe, model, tmp_path, monkeypatch, **kw):
    tuned, batch = trained(recipe, model, **kw)
    tuned.model.eval()
    want = logits(tuned.model(**batch))
    tuned.save(tmp_path / "a")
    with another_machine(monkeypatch):
        again = burnish.load(tiny(model, **kw)[0].eval(), tmp_path / "a")
        again.model.eval()
        got = logits(again.model(**batch))
    assert torch.equal(got, want), f"off by {float((got - want).abs().max())}"
    if str(again.recipe) != str(tuned.recipe):       # a file that answers holds less (`finished`)
        assert str(again.recipe) == str([p.finished() for p in tuned.recipe][0])
        return tuned, again
    for (n, a), (m, b) in zip(tuned.model.state_dict().items(), again.model.state_dict().items(),
                              strict=True):
        assert n == m and (not isinstance(a, torch.Tensor) or torch.equal(a, b)), n
    return tuned, again


@pytest.mark.parametrize("method", METHODS)
def test_a_file_brings_every_method_back_to_the_bit(method, tmp_path, monkeypatch):
    # findings 3.1
    model = next((m for m in ("vit", "llama", "mixtral", "cnn", "clip", "mlp", "points", "bert")
                  if not conformance.refusal(method, m)), None)
    assert model is not None, conformance.refusal(method, "vit")
    comes_back(conformance.recipe(method), model, tmp_path, monkeypatch)


STORED = ["nf4 + pissa(rank=4)", "nf4 + pissa(rank=4, iterations=4)", "bf16 + pissa(rank=4)",
          "nf4 + pissa(rank=4) + lora(rank=2)", "nf4 + corda(rank=4, samples=2)",
          "nf4 + olora(rank=4)", "nf4 + lora_ga(rank=4)",
          "nf4 + vera(rank=4)", "nf4 + dora(rank=4)", "nf4 + dora(rank=4) + pissa(rank=2)",
          "nf4(double_quant=False) + snella(rank=4)"]


@pytest.mark.parametrize("recipe", STORED)
def test_a_file_brings_starts_that_a_storage_absorbed_back(recipe, tmp_path, monkeypatch):
    # findings 3.1
    comes_back(recipe, "llama", tmp_path, monkeypatch, hidden_size=64)


def test_two_adapters_over_a_residual(tmp_path, monkeypatch):
    tuned, batch = trained("nf4 + pissa(rank=4)", "llama", hidden_size=64)
    tuned.add("other", "lora(rank=2)")
    tuned.save(tmp_path / "a")
    with another_machine(monkeypatch):
        again = burnish.load(tiny("llama", hidden_size=64)[0].eval(), tmp_path / "a")
    for name in ("other", "default"):
        for t in (tuned, again):
            t.use(name)
            t.model.eval()
        assert torch.equal(again.model(**batch).logits, tuned.model(**batch).logits)


def test_the_base_under_an_absorbed_start_is_whole():
    """disabled(), another adapter and a mix see W, not what the start left of it."""
    net, batch = tiny("llama", hidden_size=64, dtype=torch.float32)
    want = tiny("llama", hidden_size=64)[0].eval()(**batch).logits
    tuned = burnish.tune(net.eval(), "nf4 + pissa(rank=16)")
    start = net(**batch).logits
    near = float((start - want).norm())
    with tuned.disabled():
        base = net(**batch).logits
    torch.testing.assert_close(base, start, rtol=1e-4, atol=1e-5)     # step 0 is the base
    tuned.add("other", "lora(rank=2)")
    tuned.use("other")
    torch.testing.assert_close(net(**batch).logits, base)
    tuned.use({"default": 0.5})
    torch.testing.assert_close(net(**batch).logits, start, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuned.merge()(**batch).logits, start, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    tuned.use("default")
    assert torch.equal(net(**batch).logits, start)
    assert near < 0.5 * float(want.norm())


def test_what_a_seed_draws_again_is_in_no_file(tmp_path):
    tuned, _ = trained("vera(rank=4)", "llama")
    tuned.save(tmp_path / "a")
    held = load_file(tmp_path / "a/adapter_model.safetensors")
    assert held and not [k for k in held if ".shared." in k or k.endswith((".A", ".B"))]
    assert [s for _, _, s in slots(tuned.model)]
