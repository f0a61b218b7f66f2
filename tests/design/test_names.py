"""One name per idea: every setting of every method by name, with what the name means.

A new setting takes the name its idea has here; a new idea gets a line. Spellings of papers and of
other libraries are aliases of the one name (``setting(..., alias=(...))``).
"""

from __future__ import annotations

from dataclasses import fields

import pytest

import burnish
from burnish.core.errors import RecipeError
from burnish.core.method import Method
from burnish.core.recipe import make

MEANING = {
    "act": "activation inside a branch", "adapter": "the adapter that teaches",
    "advance": "directions made ready before they count", "grow": "components gained at a time",
    "preserve": "what was learned stays as it is", "top": "matrices that grow at once",
    "after": "tokens that stand before the added ones", "allocation": "experts per group of blocks",
    "alpha": "numerator of a scale, strength of a pull",
    "at_refresh": "state when a subspace moves",
    "b_rate": "learning rate of B over that of A", "balance": "weight of a balance loss",
    "beta1": "decay of the first moment alone", "clip": "largest mean square of an update",
    "decay_rate": "exponent by which moments come to rest",
    "scale_parameter": "steps relative to the weight",
    "beta": "a second strength beside alpha", "betas": "decays of the moments",
    "block": "channels that belong together", "bottleneck": "width of a bottleneck",
    "bound": "largest norm of what trains", "by": "what shares one rate",
    "cooldown": "share of training after a schedule has arrived", "d_start": "start of d",
    "decay": "of a smoothed score", "decompose_both": "both Kronecker factors of low rank",
    "deep": "in every block instead of the first", "double_quant": "scales are coded too",
    "dropout": "probability of a zero in training", "eps": "a small number of the update rule",
    "every": "period: updates between two, or n-th of the blocks",
    "factor": "largest first side of a Kronecker product", "folder": "where files lie",
    "form": "of a tensor decomposition", "hidden": "width of the MLP that makes a prompt",
    "ids": "tokens a prompt starts from", "in_backward": "step while backward runs",
    "init": "start of what trains", "init_rank": "rank at the start",
    "inner": "the MLP's state too",
    "iterations": "of a randomised decomposition", "k": "experts per token",
    "kind": "which of several forms", "layers": "blocks, by number or how many",
    "length": "tokens or rows of a prompt", "limit": "largest growth per update",
    "literal": "as the authors' code has it", "magnitude": "what is made of a kernel's entries",
    "mask": "how entries are chosen", "mini": "width of a repeated matrix",
    "mode": "one of two ways of working", "momentum": "of plain descent",
    "nesterov": "look ahead along the momentum", "noise": "generator of a perturbation",
    "norm": "1 or 2, of a penalty", "norm_p": "p of a distance", "norms": "norms train too",
    "on": "a switch", "ortho": "weight of an orthogonality term",
    "placement": "where a branch reads and writes", "proj_type": "side of a projection",
    "queries": "probes per update", "rank": "of the update", "ratio": "share that is taken out",
    "reduction": "a width over the narrow one", "rho": "most a part may get over the mean",
    "rounds": "how often a budget moves", "s": "share of zeros",
    "s_target": "share of zeros at last",
    "samples": "read before training", "scale": "a fixed factor",
    "scale_front": "order of two steps",
    "scaling": "law of the scale", "seed": "of what is drawn", "share": "one tensor for all",
    "spare": "blocks left whole", "state": "form of the optimizer's state",
    "state_on_leave": "state of what stops training", "svd": "exact or randomised",
    "tap": "the state a branch reads", "temperature": "of a softmax", "terms": "of a series",
    "threshold": "size below which nothing is done", "to": "where tensors wait",
    "tolerance": "when something counts as converged", "train_a": "does A train",
    "units": "what is taken out together", "warmup": "share of training before a schedule starts",
    "weight": "factor of a loss", "weight_decay": "of the weights", "which": "of the tensors",
    "whiten": "divide by the spread",
}
OWN = {f.name for f in fields(Method)}
SETTINGS = [(e.name, f) for e in burnish.methods() if e.cls.__module__.startswith("burnish.")
            for f in fields(e.cls) if f.name not in OWN]


def test_every_setting_has_the_name_of_its_idea():
    """A name that is not listed is new: is it another word for an idea that has one?"""
    new = sorted({(m, f.name) for m, f in SETTINGS if f.name not in MEANING})
    assert not new, f"{new}: use the listed name of the idea, or add a line with the new idea"


def test_the_list_holds_what_exists_and_no_idea_twice():
    assert not set(MEANING) - {f.name for _, f in SETTINGS}
    assert len(set(MEANING.values())) == len(MEANING)


@pytest.mark.parametrize("method", sorted({m for m, _ in SETTINGS}))
def test_other_spellings_mean_one_setting(method):
    """No alias is a setting of the same method, and none stands for two."""
    mine = [f for m, f in SETTINGS if m == method]
    spelt = [a for f in mine for a in f.metadata.get("alias", ())]
    assert len(spelt) == len(set(spelt)) and not set(spelt) & {f.name for f in mine}


@pytest.mark.parametrize("method, old, new, value", [
    ("houlsby", "width", "bottleneck", 4), ("parallel", "reduced", "bottleneck", 4),
    ("parallel", "width", "bottleneck", 4), ("adalora", "interval", "every", 3),
    ("adalora", "final", "cooldown", 0.2), ("galore", "update_every", "every", 3),
    ("fira", "update_every", "every", 3), ("apollo", "update_every", "every", 3)])
def test_earlier_spellings_are_still_read(method, old, new, value):
    assert make(method, {old: value}) == make(method, {new: value})
    with pytest.raises(RecipeError, match="twice"):
        make(method, {old: value, new: value})
