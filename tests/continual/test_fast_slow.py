"""Fast and slow weights: the penalty, its importance, and a step of Reptile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.continual.plane import plane

from burnish.continual import run
from burnish.continual.learners.fast_slow import FastSlow
from burnish.continual.training import batches, masked
from burnish.core.errors import ConfigError, RecipeError


class Look(FastSlow):
    name = "look"
    box: list = []

    def begin(self, study):
        super().begin(study)
        Look.box[:] = [self]


def through(cls=Look, stream=None, **settings):
    found = run(stream or plane(), "lora(rank=2)", cls(**settings))
    return Look.box[0], found


def test_no_pull_and_a_whole_step_are_plain_fine_tuning():
    for scenario in ("class", "task"):
        _, found = through(stream=plane(scenario), weight=0.0, rate=1.0)
        assert found.matrix == run(plane(scenario), "lora(rank=2)", "sequential").matrix


def test_the_pull_and_its_gradient():
    one, _ = through(weight=7.0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in one.fast.values():
            p.add_(torch.randn(p.shape, generator=g))
    got = torch.autograd.grad(7.0 * one.penalty(), list(one.fast.values()))
    for (n, p), d in zip(one.fast.items(), got, strict=True):
        want = 2 * 7.0 * one.omega[n] * (p.detach() - one.star[n])
        torch.testing.assert_close(d, want)
    assert any(o.any() for o in one.omega.values())


def test_importance_is_the_running_mean_of_squared_gradients():
    """Over the batches of a task, and over tasks; of the task's own loss, without the pull."""
    each = []

    class Weigh(Look):
        def _weigh(self, rows, t):
            names, total = list(self.fast), None
            parts = list(batches(rows, 8, self.study.seed))
            for part in parts:
                x = torch.stack([x for x, _ in part])
                y = torch.tensor([y for _, y in part])
                z = self.tuned.model.eval()(x)
                loss = F.cross_entropy(masked(z, self.study.stream.classes(t)), y)
                found = [d.square() / len(parts)
                         for d in torch.autograd.grad(loss, [self.fast[n] for n in names])]
                total = found if total is None else [a + b for a, b in
                                                     zip(total, found, strict=True)]
            each.append(dict(zip(names, total, strict=True)))
            super()._weigh(rows, t)

    one, _ = through(cls=Weigh)
    for n in one.fast:
        want = sum(e[n] for e in each) / 3
        torch.testing.assert_close(one.omega[n], want, rtol=1e-4, atol=1e-9)
    assert one.known == 3


def test_slow_weights_take_a_step_of_reptile_and_tasks_begin_from_them():
    seen = []

    class Step(Look):
        def teach(self, rows, t, step=None, **how):
            before = {n: p.detach().clone() for n, p in self.fast.items()}
            slow = {n: v.clone() for n, v in self.dual.slow.items()}
            super().teach(rows, t, step, **how)
            seen.append((self, before, slow, {n: p.detach().clone()
                                              for n, p in self.fast.items()}))

    one, _ = through(cls=Step, weight=0.0, rate=0.3)
    for i, (_, before, slow, fast) in enumerate(seen):
        after = seen[i + 1][2] if i + 1 < len(seen) else one.dual.slow
        for n in slow:
            assert torch.equal(before[n], slow[n])
            torch.testing.assert_close(after[n], slow[n] + 0.3 * (fast[n] - slow[n]))


def test_which_weights_answer():
    one, _ = through(rate=0.3)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(6, dtype=torch.bool)
    slow = one.scores(x, allowed, None)
    one.answers = "fast"
    fast = one.scores(x, allowed, None)
    assert not torch.allclose(slow, fast)
    one.dual.adopt()
    torch.testing.assert_close(one.scores(x, allowed, None), slow)


def test_the_pull_holds_and_what_it_stores():
    def moved(weight):
        moves = []

        class Move(Look):
            def learn(self, t):
                before = {n: p.detach().clone() for n, p in self.fast.items()}
                importance = self.omega
                super().learn(t)
                moves.append(sum(float((importance[n] * (self.star[n] - v).square()).sum())
                                 for n, v in before.items()) if importance else 0.0)

        _, found = through(cls=Move, weight=weight, rate=1.0)
        return sum(moves), found

    loose, tight = moved(1e-9), moved(1e5)
    assert tight[0] < 0.2 * loose[0]                 # in the directions that matter
    assert tight[1].stored[-1].parameters == 4 * 202


@pytest.mark.parametrize("settings, why", [
    ({"weight": -1.0}, "a weight of at least 0"), ({"rate": 0.0}, "a rate above 0"),
    ({"rate": 1.5}, "up to 1"), ({"answers": "both"}, "'slow' or 'fast'")])
def test_settings_are_checked(settings, why):
    with pytest.raises(ConfigError, match=why):
        FastSlow(**settings)


def test_a_recipe_that_divides_the_run_is_refused():
    with pytest.raises(RecipeError, match="one adapter for all"):
        run(plane(), "lora(rank=2) + o_lora", "fast_slow")
