"""Every axis beside every axis: each pair works or is refused with a reason (testing/pairs.py)."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import burnish
from burnish.core import registry
from burnish.testing import choose, conformance
from burnish.testing import pairs as chosen
from burnish.testing.checks.common import keyed
from burnish.testing.models import tiny

METHODS = conformance.methods()
TEXT = {name: conformance.recipe(name).rpartition(" + ")[2] for name in METHODS}
ALL = choose.everything()
ROWS = chosen.covering(chosen.pairs(METHODS), TEXT, size=2 if ALL else 4,
                       rows=None if ALL else chosen.RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_pairs(row):
    """One recipe shows up to six pairs; where a model refuses it, each pair is shown alone."""
    fits = [m for m in choose.models_for(row[0], all=True)
            if all(choose.applies(n, m) for n in row)]
    model = min(fits or ["vit"], key=lambda m: choose.rank(*row, m))
    if not works(row, model) and len(row) > 2:
        for pair in itertools.combinations(row, 2):
            works(pair, model)


def works(names, model) -> bool:
    """Trains, or refuses with a reason and leaves nothing behind (False)."""
    net, batch = tiny(model)
    recipe = " + ".join(TEXT[n] for n in names)
    if chosen.joinable(recipe):
        batch = keyed(batch, recipe)
    try:
        tuned = burnish.tune(net, recipe, calibration=[batch])
    except burnish.BurnishError as e:
        said = str(e)
        assert len(said) > 30 and "\n" not in said
        if isinstance(e, burnish.CheckError):         # neither part trains anything
            assert "nothing trains" in said
        for name, _ in net.named_modules():
            assert ".burnish" not in f".{name}", "a refused recipe leaves nothing behind"
        return False
    zeroth = "mezo" in names
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    try:
        tuned.optimizer(lr=1e-4 if zeroth else 1e-3)
        with warnings.catch_warnings():                      # what nothing is left for says so
            warnings.filterwarnings("ignore", "(wta_crs|velora) saves nothing here")
            losses = [float(tuned.step(batch)) for _ in range(3)]
    except (burnish.ConfigError, burnish.RecipeError) as e:   # what it needs shows as it starts
        assert len(str(e)) > 30 and "\n" not in str(e)
        tuned.detach()
        return False
    assert all(torch.tensor(x).isfinite() for x in losses), recipe
    moved = [n for n, p in net.named_parameters() if n in before and not p.equal(before[n])]
    assert moved, f"{recipe}: three steps moved nothing"
    tuned.detach()
    return True


@pytest.mark.parametrize("new", [[], ["lora"], ["galore", "vpt", "snella"]], ids=str)
def test_a_run_shows_every_axis_beside_every_axis_and_changed_methods_beside_all(new):
    rows = chosen.covering(chosen.pairs(METHODS, False, 5, new), TEXT, rows=chosen.RECIPES)
    shown = {p for row in rows for p in itertools.combinations(row, 2)}
    axes = {n: registry.find(n).axes()[0] for n in METHODS}
    met = {frozenset((axes[a], axes[b])) for a, b in shown}
    homes = chosen.by_axis(METHODS)
    assert met >= {frozenset(p) for p in itertools.combinations(homes, 2)}
    for name in new:
        mine = {axes[b if a == name else a] for a, b in shown if name in (a, b)}
        assert mine >= {a for a, some in homes.items() if some != [name]}, name
    assert len(rows) <= chosen.RECIPES                     # whatever the catalogue's size


def test_another_seed_shows_other_pairs():
    one, two = (set(chosen.pairs(METHODS, False, seed, ())) for seed in (1, 2))
    assert len(one & two) < len(one) / 2


def test_the_whole_product_is_every_pair_in_both_orders():
    every = chosen.pairs(METHODS, all=True)
    assert len(set(every)) == len(METHODS) * (len(METHODS) - 1)


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
