"""Every optimizer beside every part that hangs on the update: the partner acts, or is refused.

Acting is shown by state: what moved, what lives, how many entries, compared with the same run
without the partner. `total_steps` is set, so budgets act.
"""

from __future__ import annotations

import pytest
import torch

import burnish
from burnish.blocks.weight.tiled import KernelDelta
from burnish.core.recipe import parse
from burnish.methods.delta.rank.adalora import Triplets
from burnish.testing.models import tiny

STEPS = 6
OPTIMIZERS = ["adamw", "sgd(momentum=0.9)", "lion", "adamw(state='bf16')", "adam8bit",
              "adam4bit", "adafactor",
              "galore(rank=1, every=2)", "galore(rank=1, in_backward=True)",
              "step_in_backward", "stochastic_rounding", "kahan", "master_weights", "mezo",
              "frugal(every=2)", "natural_galore(rank=1, every=2)", "adam_mini",
              "zo(rule='adam', unit='block')"]
EVALUATE = ("mezo", "zo(")                       # no gradient is made
MODELS = ["vit", pytest.param("llama", marks=pytest.mark.slow)]


def run(recipe, model):
    """(tuned, weights at the start, batch) after STEPS updates on one batch."""
    net, batch = tiny(model)
    tuned = burnish.tune(net, recipe, head=False)
    tuned.total_steps = STEPS
    torch.manual_seed(3)
    with torch.no_grad():                        # zeros at the start would hide a pull
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape) * 0.02)
    lr = 1e-4 if any(word in recipe for word in EVALUATE) else 1e-2
    tuned.optimizer(lr=lr)
    start = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    for _ in range(STEPS):
        tuned.step(batch)
    return tuned, start, batch


def ends(tuned):
    return {n: p.detach() for n, p in tuned.model.named_parameters()}


def differ(a, b):
    return any(not torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_objective_acts_under_every_optimizer(optimizer, model):
    with_, without = (run(f"full + l2_sp(alpha={a}, beta={a}) + {optimizer}", model)[0]
                      for a in (50.0, 0.0))      # findings 2.2
    assert differ(ends(with_), ends(without))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_schedule_is_kept_by_every_optimizer(optimizer, model):
    tuned, start, _ = run(f"lisa(layers=1, every=100) + {optimizer}", model)     # findings 2.2
    live = next(h for n, h in tuned.timeline.handlers if n == "lisa").schedule.live
    assert len(live) == 1
    for block in (b.path for b in tuned.anatomy.blocks):
        now = ends(tuned)
        moved = any(not torch.equal(now[n], start[n]) for n in start if n.startswith(f"{block}."))
        assert moved == (block in live), block


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_budget_moves_or_is_refused(optimizer, model):
    recipe = f"snella(rank=4, s=0.05, s_target=0.8, rounds=3) + {optimizer}"     # findings 2.2
    if optimizer.startswith(EVALUATE):
        with pytest.raises(burnish.RecipeError, match="zo and snella.*gradient.*works: snella"):
            parse(recipe)
        return
    tuned, *_ = run(recipe, model)
    terms = [t for _, t in tuned.terms(KernelDelta)]
    size = sum(t.out * t.inp for t in terms)
    assert abs(sum(t.nnz() for t in terms) - 0.2 * size) <= len(terms)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_triplets_are_pruned_or_it_is_refused(optimizer, model):
    recipe = f"adalora(rank=2, init_rank=4, every=1) + {optimizer}"           # findings 2.2
    if optimizer.startswith(EVALUATE):
        with pytest.raises(burnish.RecipeError, match="zo and adalora.*gradient.*works: adalora"):
            parse(recipe)
        return
    lost = ("adamw(state", "adam8bit", "adam4bit", "adafactor", "galore", "frugal", "natural",
            "adam_mini")
    if optimizer.startswith(lost):               # pruned triplets leave for good, and moments with
        with pytest.raises(burnish.RecipeError, match=r"and adalora cannot be joined.*tensor"):
            parse(recipe)
        return
    tuned, *_ = run(recipe, model)
    terms = [t for _, t in tuned.terms(Triplets)]
    assert sum(int((t.E != 0).sum()) for t in terms) == 2 * len(terms)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_balance_acts_under_every_optimizer(optimizer, model):
    with_, without = (run(f"mola(rank=2, balance={b}, dropout=0.0) + {optimizer}", model)[0]
                      for b in (100.0, 0.0))     # findings 2.2
    assert differ(ends(with_), ends(without))


@pytest.mark.parametrize("wrapper", ["galore(rank=2)", "step_in_backward",
                                     "galore(rank=2, in_backward=True)"])
def test_what_mezo_cannot_carry_out_is_refused_when_the_recipe_is_read(wrapper):
    with pytest.raises(burnish.RecipeError, match="mezo and .*cannot be joined.*works: full"):
        parse(f"full + mezo + {wrapper}")        # findings 2.2
    with pytest.raises(burnish.RecipeError, match="cannot be joined"):
        parse(f"full + {wrapper} + mezo")


@pytest.mark.parametrize("rounding, state", [
    ("kahan", "compensation"), ("master_weights", "master"), ("stochastic_rounding", None)])
def test_roundings_act_on_bf16_weights(rounding, state):
    ends_ = []
    for recipe in ("full + lion", f"full + lion + {rounding}"):
        net, batch = tiny("bert")
        net.to(torch.bfloat16)
        tuned = burnish.tune(net, recipe, head=False)
        opt = tuned.optimizer(lr=1e-4)
        for _ in range(2):
            tuned.step(batch)
        ends_.append({n: p.detach().clone() for n, p in net.named_parameters()})
    assert differ(*ends_)
    assert state is None or all(state in s for s in opt.state.values())


class Alone:
    """An own step that declares nothing."""

    name = "alone"

    def build(self, groups, plan, seed, accumulation):
        raise AssertionError("never reached")

    def hyper(self):
        return {}


@pytest.mark.parametrize("partner", ["stochastic_rounding", "step_in_backward", "l2_sp", "adalora",
                                     "lisa", "mola", "snella"])
def test_an_own_step_that_declares_nothing_stands_alone(partner):
    from dataclasses import dataclass

    from burnish.core.method import Method

    @dataclass(frozen=True, kw_only=True)        # findings 2.2
    class Own(Method):
        def optimizer(self):
            return Alone()

    Own.name = "own"
    with pytest.raises(burnish.RecipeError, match=f"own and {partner} cannot be joined"):
        parse(["full" if partner not in ("lisa", "mola") else "lora", Own(), partner])
