"""Runs whose updates say little of any one row: how rows are drawn, and what such a run tells."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import ConfigError, DataError
from burnish.core.sampling import Sampling
from burnish.fit.loop import Trainer
from burnish.fit.pictures import Picture
from burnish.fit.secret import Drawn

SMALL = {"quiet": True, "report": False, "test": False, "measure": False, "validation": 0.1,
         "lr_scheduler_type": "constant", "warmup_steps": 0, "lr": 0.5,
         "processor": Picture(8, 8, (0.5,), (0.5,))}


def net(norm=nn.LayerNorm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), norm(12), nn.Tanh(), nn.Linear(12, 10))


def fitted(folder, recipe="full + dp(accountant='rdp') + sgd", model=None, **kw):
    return burnish.fit(model or net(), "digits", recipe, output=folder,
                       **{**SMALL, "batch_size": 24, **kw})


def test_rows_are_drawn_each_by_itself():
    drawn = Drawn(Sampling(200, 10), 3)
    assert len(drawn) == 20
    batches, seen = [], Counter()
    for epoch in range(60):
        drawn.set_epoch(epoch)
        batches += list(drawn)
    for b in batches:
        assert b == sorted(set(b))
        seen.update(b)
    sizes = torch.tensor([float(len(b)) for b in batches])
    assert abs(float(sizes.mean()) - 10) < 0.3                   # binomial: mean 10, variance 9.5
    assert abs(float(sizes.var()) - 9.5) < 1.2
    times = torch.tensor([float(seen[i]) for i in range(200)])
    assert abs(float(times.mean()) - 60) < 2 and 30 < float(times.min())
    again = Drawn(Sampling(200, 10), 3)
    assert list(again) == batches[:20] == list(again)            # of (seed, epoch) alone
    again.set_epoch(1)
    assert list(again) == batches[20:40] != batches[:20]
    assert list(Drawn(Sampling(200, 10), 4)) != batches[:20]
    assert any(not b for b in Drawn(Sampling(200, 1), 0))
    assert len(Drawn(Sampling(3, 2), 0)) == 2 and len(Drawn(Sampling(3, 3), 0)) == 1
    assert list(Drawn(Sampling(3, 3), 0)) == [[0, 1, 2]]         # all of them, always


def test_a_run_says_what_it_has_spent_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    sizes = []
    real = Trainer.training_step

    def step(self, model, inputs, *rest):
        sizes.append(len(inputs["labels"]))
        return real(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", step)
    whole = fitted(tmp_path / "a", max_steps=8, save_steps=4, report=True)
    assert len(set(sizes)) > 2 and len(sizes) == 8
    told = json.loads((tmp_path / "a" / "run.json").read_text())["told"]["dp"]
    assert told == whole.facts["told"]["dp"] and told["updates"] == 8
    rows = whole.facts["data"]["rows"]
    assert told["delta"] == 1 / rows["train"] and told["rate"] == 24 / rows["train"]
    assert 7.9 < told["epsilon"] < 8
    assert f"epsilon {told['epsilon']:.4g}" in (tmp_path / "a" / "report.html").read_text()
    assert whole.facts["training"]["max_grad_norm"] == 0.0

    first = fitted(tmp_path / "b", max_steps=8, save_steps=4)
    for folder in (tmp_path / "b").glob("checkpoint-8"):
        import shutil

        shutil.rmtree(folder)
    again = fitted(tmp_path / "b", max_steps=8, save_steps=4, resume=True)
    for p, q, r in zip(whole.tuned.parameters(), first.tuned.parameters(),
                       again.tuned.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert again.facts["told"]["dp"] == told


def test_a_batch_without_rows_is_an_update_of_noise(tmp_path):
    run = fitted(tmp_path, "norms + dp(sigma=0.3) + sgd", batch_size=1, max_steps=6, head=False)
    assert run.facts["told"]["dp"]["updates"] == 6
    assert all(p.isfinite().all() for p in run.tuned.parameters())


def test_a_model_of_transformers_too(tmp_path, glyph_vit):
    run = burnish.fit(glyph_vit, "digits", "norms + dp(epsilon=4.0, accountant='rdp')",
                      output=tmp_path, batch_size=2, max_steps=3, quiet=True, report=False,
                      test=False, validation=0)
    told = run.facts["told"]["dp"]
    assert told["updates"] == 3 and told["epsilon"] < 4          # not what was measured besides
    assert run.truth.peak_bytes == run.promise.peak_bytes


@pytest.mark.parametrize("kw, match", [
    ({"max_grad_norm": 1.0}, "^max_grad_norm cuts what dp sums"),
    ({"gradient_accumulation_steps": 2}, "^dp makes a pass for each sample, so accumulation"),
    ({"recipe": "full + dp(batch=7.0) + sgd"}, "batch=7, and this run draws by 24"),
    ({"recipe": "eva(rank=2) + dp"}, "^a part of the recipe reads training rows.*and dp"),
    ({"model": net(nn.BatchNorm1d)}, "norms that a sample has by itself"),
    ({"batch_size": 5000}, "cannot be expected to draw 5000"),
])
def test_what_such_a_run_cannot_honour_is_refused(tmp_path, kw, match):
    with pytest.raises((ConfigError, DataError, burnish.BurnishError), match=match):
        fitted(tmp_path, max_steps=2, **kw)


def test_other_runs_are_as_they_were(tmp_path):
    run = fitted(tmp_path, "full + sgd", max_steps=2)
    assert "told" not in run.facts and run.tuned.sampling is None
    assert run.facts["training"].get("max_grad_norm", 1.0) != 0.0
