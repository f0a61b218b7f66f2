"""The learner sema: a task adds an adapter where it is unlike what came before, else nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.continual.plane import plane

import burnish
from burnish.continual import Task, Training, run
from burnish.continual.learners.sema import Sema
from burnish.core.errors import ConfigError, RecipeError
from burnish.testing.models import tiny

RECIPE = "sema(layers=(0, 1), bottleneck=3, descriptor=16, buffer=32) + sgd(momentum=0.9)"


def rows(classes, shift, seed, n=16):
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(9)) / 2
    return [(torch.randn(3, 16, 16, generator=g) + maps[c]
             + shift * torch.linspace(-1, 1, 16), c) for c in classes for _ in range(n)]


def stream(shifts=(0.0, 0.0, 6.0), own=True, **more):
    """A task for each shift; `own`: with classes of its own."""
    tasks = []
    for t, shift in enumerate(shifts):
        classes = (2 * t, 2 * t + 1) if own else (0, 1)
        tasks.append(Task(f"part {t}", classes, rows(classes, shift, 2 * t),
                          rows(classes, shift, 2 * t + 1, 4)))
    return replace(plane(), scenario="class" if own else "domain", tasks=tuple(tasks),
                   model=lambda: tiny("vit", num_labels=2 * len(shifts) if own else 2)[0],
                   collate=lambda xs: {"pixel_values": torch.stack(xs)},
                   training=Training(epochs=15, batch=8, rate=5e-2), **more)


def through(given=None, recipe=RECIPE, hook=None, **settings):
    box = []

    class Look(Sema):
        name = "look"

        def begin(self, study):
            super().begin(study)
            box[:] = [self]

        def learn(self, t):
            super().learn(t)
            if hook is not None:
                hook(self, t)

    found = run(given or stream(), recipe, Look(**{"batch": 16, **settings}))
    return box[0], found


@pytest.mark.slow
def test_a_task_like_the_first_adds_nothing_and_a_shifted_one_does():
    kept, phases = [], []

    def hook(one, t):
        kept.append({n: x.clone() for n, x in one.tuned.model.state_dict().items()})
        phases.append({n for n, p in one.tuned.model.named_parameters() if p.requires_grad})

    one, found = through(stream((0.0, 0.0, 6.0), own=False), hook=hook)
    assert one.grown[:2] == [(), ()] and one.grown[2] and one.grown[2][0] == 0
    assert len(set(one.grown[2])) == len(one.grown[2])
    assert list(one.tuned.adapters) == ["task1", *(
        f"task3_{k + 1}" for k in range(len(one.grown[2])))]
    assert dict(one.tuned.state.active) == dict.fromkeys(one.tuned.adapters, 1.0)
    per = 2 * 32 * 3 + 3 + 32 + 2 * 32 * 16 + 16 + 32 + 32       # the record too, and the router
    per += 32 + 1
    assert found.added[1] == 0 and found.added[2] == per * len(one.grown[2])
    for before, after in ((kept[0], kept[1]), (kept[1], kept[2])):
        for n, x in before.items():                  # what was learnt stays, bit for bit
            assert torch.equal(x, after[n]) != n.startswith("classifier."), n
    assert all(names == {"classifier.weight", "classifier.bias"} for names in phases)


@pytest.mark.slow
def test_columns_of_earlier_classes_stay_and_tasks_have_classes_of_their_own():
    heads = []
    through(hook=lambda one, t: heads.append(
        one.tuned.model.classifier.weight.detach().clone()))
    for t in (1, 2):
        same = (heads[t] == heads[t - 1]).all(1)
        assert [not s for s in same.tolist()] == [c // 2 == t for c in range(6)]


@pytest.mark.slow
def test_each_phase_trains_its_own_and_with_a_fresh_optimizer():
    seen = []

    class Look(Sema):
        name = "look"

        def teach(self, rows, t, **how):
            before = {n: p.detach().clone() for n, p in self.tuned.named_parameters()}
            super().teach(rows, t, **how)
            changed = [n for n, p in self.tuned.named_parameters() if not torch.equal(p, before[n])]
            assert changed and len(before) == len(list(self.tuned.named_parameters()))
            kinds = {".descriptor." in n for n in before}
            own = {n.split(".burnish.")[1].split(".")[0] for n in before if ".burnish." in n}
            steps = len(self.tuned.current_optimizer.state)
            seen.append((t, kinds, own, "classifier.weight" in before, steps == len(before),
                         how.get("epochs")))

    run(stream((0.0, 0.0, 6.0), own=False), RECIPE, Look(batch=16, epochs=11))
    assert [s[0] for s in seen[:3]] == [0, 0, 1]
    assert seen[0][1:] == ({False}, {"task1"}, True, True, None)
    assert seen[1][1:] == ({True}, {"task1"}, False, True, 11)
    assert seen[2][1:] == ({False}, set(), True, True, None)         # nothing came: the head
    assert seen[3][1:] == ({False}, {"task3_1"}, True, True, None)
    assert seen[4][1:] == ({True}, {"task3_1"}, False, True, 11)
    assert all(s[0] == 2 for s in seen[3:]) and not len(seen[3:]) % 2


def test_a_head_that_is_kept_and_nothing_new_is_a_task_that_trains_nothing():
    calls = []

    class Look(Sema):
        name = "look"

        def teach(self, rows, t, **how):
            calls.append(t)
            super().teach(rows, t, **how)

    run(stream((0.0, 0.0), own=False, head=False), RECIPE, Look(batch=16))
    assert calls == [0, 0]


def test_it_is_run_by_name_and_answers_in_one_pass():
    report = burnish.continual(stream((0.0, 6.0)), RECIPE, learners=["sema(batch=16, epochs=2)"])
    line = next(x for x in report.lines if x.learner.startswith("sema"))
    assert line.results[0].matrix.tasks == 2


@pytest.mark.parametrize("recipe, says", [
    ("lora(rank=2)", "has none to begin with"),
    ("sema(layers=(0, 1), grown=1)", "has none to begin with"),
    ("sema(layers=(0, 1)) + mixda(layers=(1,))", "general"),
    ("sema(layers=(0, 1)) + adalora(rank=2)", "trains in phases")])
def test_refusals(recipe, says):
    with pytest.raises(RecipeError, match=says):
        run(stream(), recipe, "sema")
    for bad in ({"epochs": 0}, {"batch": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            Sema(**bad)
