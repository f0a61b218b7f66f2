"""Slow values that follow fast ones: each rule in closed form, and a swap without a trace."""

from __future__ import annotations

import pytest
import torch
from tests.continual.plane import plane
from torch import nn

from burnish.continual import run
from burnish.continual.dual import DualWeights, along, constant, step, warmed
from burnish.continual.learners.sequential import Sequential
from burnish.continual.training import cross_entropy
from burnish.core.errors import ConfigError


def pair(rule, dtype=torch.float64):
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype))
    return p, DualWeights({"p": p}, rule)


def test_rules_in_closed_form():
    values = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rule, keeps in ((constant(0.9), [0.9] * 6), (step(0.25), [0.75] * 6),
                        (warmed(0.7), [1 / 2, 2 / 3, 0.7, 0.7, 0.7, 0.7])):
        p, dual = pair(rule)
        want = p.detach().clone()
        for v, keep in zip(values, keeps, strict=True):
            p.data.copy_(v)
            dual.follow()
            want = keep * want + (1 - keep) * v
            torch.testing.assert_close(dual.slow["p"], want, rtol=1e-13, atol=1e-14)


def test_the_mean_of_the_first_values():
    """keep = 1 - 1 / (n + 1) is the mean of the start and all that came."""
    p, dual = pair(warmed(1.0))
    all_ = [p.detach().clone()]
    for i in range(5):
        p.data.add_(i + 1.0)
        all_.append(p.detach().clone())
        dual.follow()
    torch.testing.assert_close(dual.slow["p"], torch.stack(all_).mean(0))


def test_ends_of_a_rule_are_exact():
    p, dual = pair(constant(1.0), torch.float32)
    start = p.detach().clone()
    p.data.add_(0.1)
    dual.follow()
    assert torch.equal(dual.slow["p"], start)
    dual.rule = step(1.0)
    dual.follow()
    assert torch.equal(dual.slow["p"], p.detach())


def test_a_swap_leaves_no_trace_whatever_is_raised():
    p, dual = pair(constant(0.5))
    p.data.add_(1.0)
    fast = p.detach().clone()
    with pytest.raises(RuntimeError), dual.standing():
        assert torch.equal(p.detach(), dual.slow["p"]) and not torch.equal(p.detach(), fast)
        raise RuntimeError
    assert torch.equal(p.detach(), fast)
    dual.adopt()
    assert torch.equal(p.detach(), dual.slow["p"])


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(ConfigError, match="nothing trains"):
        DualWeights({}, constant(0.9))
    p, dual = pair(constant(0.5))
    p.data = torch.zeros(2, dtype=torch.float64)
    for act in (dual.follow, dual.adopt, lambda: dual.standing().__enter__()):
        with pytest.raises(ConfigError, match="was .3,. and is .2,. now"):
            act()


def test_a_path_between_two_sets_of_values():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    start, end = {"p": torch.zeros(2).double()}, {"p": torch.tensor([2.0, 4.0]).double()}
    found = along({"p": p}, start, end, lambda: float(p.sum()), points=5)
    assert found == [(0.0, 0.0), (0.25, 1.5), (0.5, 3.0), (0.75, 4.5), (1.0, 6.0)]
    assert p.tolist() == [1.0, -2.0]


def test_between_two_tasks_there_are_weights_better_for_both():
    """I-LoRA's observation, on two tasks whose classes compete: the loss over both has its least
    between what was learnt first and what was learnt then."""
    class Look(Sequential):
        name = "look"
        ends: list = []

        def learn(self, t):
            super().learn(t)
            Look.ends.append({n: p.detach().clone()
                              for n, p in self.tuned.named_parameters()})
            if t == 1:
                rows = [r for task in self.study.stream.tasks[:2] for r in task.test]
                x, y = torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])
                allowed = self.study.stream.classes(1)
                model = self.tuned.model.eval()
                Look.path = along(dict(self.tuned.named_parameters()), *Look.ends,
                                  lambda: cross_entropy(model(x), y, allowed))

    run(plane(classes=4), "lora(rank=2)", Look())
    losses = [v for _, v in Look.path]
    least = losses.index(min(losses))
    assert 0 < least < 10 and losses[least] < 0.9 * min(losses[0], losses[-1])


def test_a_path_has_two_ends():
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="points=1: a path has two ends"):
        along({"p": p}, {"p": p}, {"p": p}, lambda: 0.0, points=1)
