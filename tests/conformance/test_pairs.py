"""A partner from every axis, in both orders: each pair works or is refused with a reason."""

from __future__ import annotations

import itertools

import pytest
import torch

import burnish
from burnish.testing import conformance
from burnish.testing.models import tiny

#: one or two partners per axis
PARTNERS = ["nf4", "bf16", "lora", "dora", "snella", "shira", "bitfit", "full", "parallel", "ia3",
            "vpt", "prefix", "lst", "checkpoint", "offload", "lean", "galore", "lion", "mezo",
            "lisa", "adalora", "l2_sp", "mola"]


def text(name: str) -> str:
    whole = conformance.recipe(name)
    return whole.rpartition(" + ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("first, second", list(itertools.permutations(PARTNERS, 2)))
def test_pair(first, second):
    model, batch = tiny("vit")
    recipe = f"{text(first)} + {text(second)}"
    try:
        tuned = burnish.tune(model, recipe)
    except burnish.BurnishError as e:
        said = str(e)
        assert len(said) > 30 and "\n" not in said
        if isinstance(e, burnish.CheckError):         # neither part trains anything
            assert "nothing trains" in said
        for name, _ in model.named_modules():
            assert ".burnish" not in f".{name}", "a refused recipe leaves nothing behind"
        return
    zeroth = "mezo" in (first, second)
    tuned.optimizer(lr=1e-4 if zeroth else 1e-3)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    losses = [float(tuned.step(batch)) for _ in range(3)]
    assert all(torch.tensor(x).isfinite() for x in losses)
    moved = [n for n, p in tuned.named_parameters() if n in before and not p.equal(before[n])]
    assert moved, "three steps moved nothing"
    tuned.detach()


@pytest.mark.parametrize("recipe, words", [
    ("dora + dora", ["both", "function of W"]),
    ("checkpoint + lora + checkpoint", ["checkpoint", "mode of the blocks"]),
    ("adamw + lion + lora", ["adamw", "lion"]),
    ("nf4 + full", ["full", "nf4"]),
    ("nf4 + bf16 + lora", ["nf4", "bf16", "grid"]),
])
def test_what_cannot_be_joined_says_why(recipe, words):
    model, _ = tiny("vit")
    with pytest.raises(burnish.RecipeError) as e:
        burnish.tune(model, recipe)
    for w in words:
        assert w in str(e.value)
