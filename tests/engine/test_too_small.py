"""Places that a rank does not fit: refused where somebody has named them, left alone where nobody
has, whether the method reads data first or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import BurnishError, RankError
from burnish.core.recipe import make
from burnish.core.registry import find, names


class Two(nn.Module):
    """A square matrix, one with a side too short for the rank, and a head."""

    def __init__(self, big=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(24, 24 if big else 2)
        self.second = nn.Linear(24 if big else 2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x, labels=None):
        out = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return {"loss": (out - labels).square().mean(), "logits": out}


DATA = [{"x": torch.randn(4, 24), "labels": torch.randn(4, 2)} for _ in range(3)]


def tuned(recipe, targets=None, big=True):
    try:
        return burnish.tune(Two(big), recipe, targets=targets, head=False, calibration=DATA)
    except burnish.ConfigError as e:
        if isinstance(e, RankError) or "calibration" not in str(e):
            raise
        return burnish.tune(Two(big), recipe, targets=targets, head=False)


def ranked() -> dict:
    """Methods with a rank that fits the one matrix and not the other."""
    out = {}
    for name in names(extra=False):
        if "delta" not in find(name).axes() or "rank" not in find(name).__dataclass_fields__:
            continue
        try:
            recipe = make(name, {**find(name).small, "rank": 4})
            tuned(recipe, "first")
        except BurnishError:
            continue                                       # it wants more than this model has
        try:
            tuned(recipe, "second")
        except RankError as e:
            out[name] = (recipe, e)
    return out


def test_what_is_too_small_is_left_alone_unless_it_is_named():
    found, wrong = ranked(), {}
    for name, (recipe, refusal) in found.items():
        assert "second.weight" in str(refusal) and name in str(refusal)
        try:
            said = tuned(recipe).adapters["default"].notes
        except BurnishError as e:
            said = [str(e)]
        if f"{name} leaves 1 of 2 weights alone, too small for its rank, e.g. second.weight " \
                "(2 x 24)" not in said:
            wrong[name] = said
    assert not wrong
    assert {"lora", "fact", "lamda", "ce_ssl", "eva", "spt", "corda", "mos"} <= set(found)


@pytest.mark.parametrize("name", ["lora", "ce_ssl", "eva", "spt"])
def test_where_it_fits_nowhere_it_is_refused(name):
    with pytest.raises(RankError, match=f"^{name}: rank 4 does not fit"):
        tuned(f"{name}(rank=4)", big=False)


@pytest.mark.parametrize("name", ["ce_ssl", "eva", "spt"])
def test_what_is_left_alone_is_so_after_a_load(name, tmp_path):
    first = tuned(f"{name}(rank=4)")
    first.save(tmp_path / "a")
    again = burnish.load(Two(), tmp_path / "a")
    assert again.tensors().keys() == first.tensors().keys()
    assert {n.split(".")[0] for n in again.tensors()} == {"first"}


@pytest.mark.parametrize("name", ["ce_ssl", "eva", "spt"])
def test_what_is_named_is_refused_before_anything_is_read(name):
    model = Two()
    model.first.register_forward_hook(lambda *a: pytest.fail("it ran"))
    with pytest.raises(RankError, match="second.weight"):
        burnish.tune(model, f"{name}(rank=4)", targets="first,second", head=False,
                     calibration=DATA)
