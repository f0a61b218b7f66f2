"""The weight-decay scaling rule: exact ratios, and the equilibrium that they are for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import burnish
from burnish.blocks.update.groups import Widths
from burnish.blocks.update.step import compose
from burnish.core.errors import ConfigError, RecipeError
from burnish.core.recipe import parse
from burnish.testing.models import tiny


def answers(recipe):
    return [m.optimizer() for m in parse(recipe)]


def rates(opt):
    return {n: (g["lr"], g["weight_decay"]) for g in opt.param_groups for n in g["param_names"]}


@pytest.mark.parametrize("rule, kind", [("adamw(weight_decay=0.1)", torch.optim.AdamW),
                                        ("lion(weight_decay=0.1)", None),
                                        ("mezo(weight_decay=0.1)", None)])
@pytest.mark.parametrize("settings, ratio", [("proxy=8", 4.0), ("proxy=128", 0.25),
                                             ("proxy=8, wide=72", 9.0)])
def test_matrices_of_blocks_follow_the_width_and_the_rest_has_no_decay(rule, kind, settings, ratio):
    net, batch = tiny("llama")                       # of width 32
    tuned = burnish.tune(net, f"full + {rule} + width_rule({settings})", head=True)
    opt = tuned.optimizer(lr=1e-3)
    assert kind is None or type(opt) is kind         # and stays as fast as it is
    found = rates(opt)
    inside = {n for n, p in tuned.named_parameters() if ".layers." in n and p.dim() > 1}
    assert inside and set(found) == {n for n, _ in tuned.named_parameters()} != inside
    for name, (lr, decay) in found.items():
        if name in inside:
            assert lr == pytest.approx(1e-3 / ratio) and decay == pytest.approx(
                0.1 * math.sqrt(ratio))
        else:
            assert (lr, decay) == (1e-3, 0.0), name
    tuned.step(batch)


def test_factors_of_a_tensor_go_along():
    """burnish_lr multiplies, and what has no decay gets none."""
    named = [(f"layers.0.{n}", nn.Parameter(torch.ones(4, 4))) for n in "abc"]
    named[1][1].burnish_lr, named[2][1].burnish_decay = 3.0, False
    found = rates(compose(answers("adamw(weight_decay=0.2) + width_rule(proxy=2)"), named, 1.0,
                          width=8))
    assert [found[n] for n, _ in named] == [(0.25, 0.4), (0.75, 0.4), (0.25, 0.0)]
    plain = rates(compose(answers("adamw(weight_decay=0.2)"), named, 1.0, width=8))
    assert [plain[n] for n, _ in named] == [(1.0, 0.2), (3.0, 0.2), (1.0, 0.0)]


def test_which_tensors_are_matrices_of_blocks_is_the_callers_to_say():
    named = [("one", nn.Parameter(torch.ones(4, 4))), ("two", nn.Parameter(torch.ones(4, 4))),
             ("two.bias", nn.Parameter(torch.ones(4)))]
    found = rates(compose(answers("adamw(weight_decay=0.2) + width_rule(proxy=2)"), named, 1.0,
                          width=8, inside=lambda n: n.startswith("two")))
    assert found == {"one": (1.0, 0.0), "two": (0.25, 0.4), "two.bias": (1.0, 0.0)}


def settled(d, lr, wd, updates):
    """Root mean square of a matrix under AdamW and gradients of pure noise, as the loss of a
    matrix before a norm has them along the sphere, once decay and noise have met."""
    g = torch.Generator().manual_seed(d)
    p = nn.Parameter(torch.zeros(d, d))
    (found,) = {r for n, r in rates(compose(
        answers(f"adamw(weight_decay={wd}) + width_rule(proxy=16)"), [("layers.0.w", p)], lr,
        width=d)).items()}
    opt = compose(answers(f"adamw(weight_decay={wd}, betas=(0.9, 0.99)) + width_rule(proxy=16)"),
                  [("layers.0.w", p)], lr, width=d)
    seen = []
    for t in range(updates):
        noise = torch.randn(d, d, generator=g)
        w = p.detach()
        p.grad = noise - (noise * w).sum() / w.square().sum().clamp_min(1e-12) * w
        opt.step()
        if t > updates // 2:
            seen.append(float(p.detach().square().mean().sqrt()))
    return sum(seen) / len(seen), found


def test_the_equilibrium_follows_the_law_over_a_fourfold_width():
    narrow, (lr0, wd0) = settled(16, 0.02, 0.5, 1200)
    wide, (lr, wd) = settled(64, 0.02, 0.5, 1200)
    assert (lr0, wd0) == (0.02, 0.5) and (lr, wd) == (0.005, 1.0)
    want = math.sqrt(lr / wd) / math.sqrt(lr0 / wd0)
    assert want == pytest.approx(4 ** -0.75)
    assert wide / narrow == pytest.approx(want, rel=0.1)


def test_what_cannot_act_is_refused():
    for proxy, width in ((0, 0), (8, -1)):
        with pytest.raises(RecipeError, match="width_rule: proxy and width are widths of models"):
            Widths(proxy=proxy, width=width)
    with pytest.raises(RecipeError, match="width_rule: proxy and width are widths of models"):
        answers("width_rule(proxy=0)")
    with pytest.raises(ConfigError, match=r"how wide its states are; set width_rule\(wide=...\)"):
        compose(answers("width_rule"), [("layers.0.w", nn.Parameter(torch.ones(4, 4)))], 1.0)
    with pytest.raises(RecipeError, match="learning rates by width|both decide"):
        burnish.tune(tiny("llama")[0], "full + width_rule + width_rule(proxy=8)")


def test_its_settings():
    (made,) = parse("width_rule")
    assert (made.proxy, made.wide) == (256, 0)
