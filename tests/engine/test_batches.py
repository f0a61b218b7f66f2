"""A batch: a mapping, a tensor, or a tuple of either and what a loss reads beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import burnish
from burnish.core.batches import call, cut, moved, singly, size, tensors
from burnish.core.errors import DataError
from burnish.testing.models import tiny


def apart(batch):
    return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]


def loss(out, batch):
    return F.cross_entropy(out.logits, batch[1])


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "corda(rank=2)", "lora(rank=2) + checkpoint",
                                    "lora(rank=2) + mezo"])
def test_a_mapping_beside_its_target_is_a_batch_like_any(recipe):
    """Promise, truth and step are those of the mapping with its labels inside."""
    made = {}
    for kind in ("within", "beside"):
        model, batch = tiny("bert", batch=4)
        how = {} if kind == "within" else {"loss": loss}
        batch = batch if kind == "within" else apart(batch)
        promise = burnish.simulate(model, recipe, batch, **how)
        tuned = burnish.tune(model, recipe, calibration=[batch], seed=0)
        tuned.optimizer(lr=1e-2)
        truth = burnish.measure(tuned, batch, **how)
        if kind == "beside":
            assert promise.peak_bytes == truth.peak_bytes
        values = [float(tuned.step(batch, *how.values())) for _ in range(3)]
        made[kind] = values, {n: p.detach().clone() for n, p in tuned.named_parameters()}
    assert made["within"][0] == pytest.approx(made["beside"][0], abs=1e-6)
    for name, value in made["within"][1].items():
        assert torch.allclose(value, made["beside"][1][name], atol=1e-5), name


def test_samples_are_cut_at_every_depth():
    batch = {"x": torch.arange(3), "n": torch.tensor(7)}, (torch.arange(6).view(3, 2), "kept")
    assert size(batch) == 3 and len(list(tensors(batch))) == 2
    some = cut(batch, 3, 1)
    assert some[0]["x"].tolist() == [1, 2] and some[0]["n"] == 7
    assert some[1][0].tolist() == [[2, 3], [4, 5]] and some[1][1] == "kept"
    assert [b[0]["x"].tolist() for b in singly(batch)] == [[0], [1], [2]]
    assert moved(batch, "cpu")[1][1] == "kept"
    with pytest.raises(DataError, match="samples along its first dimension, not str"):
        size("text")


def test_a_model_is_called_with_what_it_takes():
    model, batch = tiny("bert")
    given, labels = apart(batch)
    assert torch.equal(call(model, (given, labels)).logits, call(model, given).logits)
    linear = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(call(linear, (x, labels)), call(linear, x))
