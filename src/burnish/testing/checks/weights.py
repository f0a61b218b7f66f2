"""Merging, unmerging, saving and loading."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

from ...core.errors import CheckError
from ...engine.slot import ATTR
from ...formats.adapter import load
from .common import Skip, close, fresh, join, logits, make, ready, recipe, stir, widen


def merges_and_unmerges(name: str, model: str) -> Skip | None:
    """Merged outputs agree; unmerging restores every bit; what cannot merge says why."""
    tuned, batch, _ = make(name, model, train=False)
    widen(tuned)
    stir(tuned)
    before = {n: t.clone() for n, t in tuned.model.state_dict().items() if isinstance(t, Tensor)}
    with torch.no_grad():
        want = logits(tuned.model(**batch))
    if not all(m.merges for m in tuned.recipe):
        try:
            tuned.merge()
        except CheckError as e:
            assert "merge" in str(e)
            return None
        raise AssertionError("merges although it says it cannot")
    merged = tuned.merge()
    assert not any(f".{ATTR}." in f".{n}" for n in merged.state_dict())
    with torch.no_grad():
        close(logits(merged(**batch.bare)), want, "outputs after merging", 1e-6)
    tuned.unmerge()
    after = tuned.model.state_dict()
    for n, t in before.items():
        assert torch.equal(after[n], t), f"{n} differs after unmerge"
    with torch.no_grad():
        assert torch.equal(logits(tuned.model(**batch)), want)
    return None


def saves_and_loads(name: str, model: str) -> Skip | None:
    """A saved folder gives the same outputs on a fresh base, running statistics included."""
    net, batch = fresh(model, text=recipe(name))
    tuned = join(net, recipe(name), model)
    ready(tuned, 2, lr=1e-2)
    for _ in range(2):
        tuned.step(batch)
    stir(tuned)
    net.eval()
    with torch.no_grad():
        want = logits(net(**batch))
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        base = fresh(model)[0].eval()
        with torch.no_grad():
            got = logits(load(base, folder).model(**batch))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    return None


CHECKS = (merges_and_unmerges, saves_and_loads)
