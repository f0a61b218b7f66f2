"""The timeline: what runs when, in which order, and how it resumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import burnish
from burnish.core.errors import ConfigError
from burnish.core.events import EVENTS, Timeline
from burnish.core.method import Method, setting


class Recorder:
    def __init__(self, log, name, phase=50):
        self.log, self.name, self.phase = log, name, phase

    def __getattr__(self, event):
        if event not in EVENTS:
            raise AttributeError(event)
        return lambda *args: self.log.append((event, self.name, *args))


def test_the_picture():
    """start, then per step: step_begin, before_update, after_update, step_end."""
    log = []
    line = Timeline([("a", Recorder(log, "a"))])
    line.start(2)
    line.start(2)                                       # once is enough
    for _ in range(2):
        line.before_update()
        line.after_update()
    assert [(e, *rest) for e, _, *rest in log] == [
        ("start", 2), ("step_begin", 0), ("before_update", 0), ("after_update", 0),
        ("step_end", 0), ("step_begin", 1), ("before_update", 1), ("after_update", 1),
        ("step_end", 1), ("step_begin", 2)]
    assert line.step == 2


def test_phases_order_handlers_then_the_recipe_does():
    log = []
    line = Timeline([("late", Recorder(log, "late", 90)), ("first", Recorder(log, "first")),
                     ("second", Recorder(log, "second")), ("early", Recorder(log, "early", 10))])
    line.before_update()
    assert [name for _, name, _ in log] == ["early", "first", "second", "late"]


def test_handlers_without_an_event_are_passed_over():
    class Only:
        def __init__(self):
            self.seen = []

        def after_update(self, step):
            self.seen.append(step)

    only = Only()
    line = Timeline([("only", only)])
    line.start(None)
    line.before_update()
    line.after_update()
    assert only.seen == [0]


def test_the_trace_says_what_ran():
    line = Timeline([("a", Recorder([], "a"))])
    line.start(1)
    line.before_update()
    assert [e for e, _, _ in line.trace] == ["start", "step_begin", "before_update"]
    assert set(line.trace) == {(e, "a", 0) for e in ("start", "step_begin", "before_update")}
    for _ in range(500):
        line.before_update()
    assert len(line.trace) == 256, "it stays short"


class Counter:
    def __init__(self):
        self.n = 0

    def after_update(self, step):
        self.n += 1

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def test_state_and_load():
    a, b = Timeline([("c", Counter()), ("r", Recorder([], "r"))]), Timeline([("c", Counter())])
    a.start(9)
    for _ in range(3):
        a.after_update()
    assert a.state() == {"step": 3, "handlers": {"c": {"n": 3}}}
    b.load(a.state())
    assert b.step == 3 and b.handlers[0][1].n == 3 and b.started


# -- hanging on the optimizer ----------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Watcher(Method):
    """Writes down what happens to a weight and its gradient."""

    name: ClassVar[str] = "watcher"
    log: list = setting(None)

    def controller(self, tuned):
        return Handler(self.log, next(tuned.parameters()))


class Handler:
    def __init__(self, log, weight):
        self.log, self.weight = log, weight

    def start(self, total):
        self.log.append(("start", total))

    def step_begin(self, step):
        self.log.append(("step_begin", step))

    def before_update(self, step):
        self.log.append(("before", step, self.weight.detach().clone(), self.weight.grad.clone()))

    def after_update(self, step):
        self.log.append(("after", step, self.weight.detach().clone(), self.weight.grad.clone()))

    def step_end(self, step):
        self.log.append(("step_end", step))


def tuned_with(log):
    torch.manual_seed(0)
    return burnish.tune(nn.Sequential(nn.Linear(4, 4)), ["full", Watcher(log=log)])


@pytest.mark.parametrize("own", [False, True], ids=["step", "own loop"])
def test_gradients_are_complete_before_and_still_there_after(own):
    log = []
    tuned = tuned_with(log)
    tuned.total_steps = 2
    opt = tuned.optimizer(lr=0.1)
    x = torch.randn(3, 4)
    for _ in range(2):
        if own:
            opt.zero_grad()
            tuned.model(x).square().sum().backward()
            opt.step()
        else:
            tuned.step(x, loss=lambda y, _: y.square().sum())
    assert [entry[:2] for entry in log] == [
        ("start", 2), ("step_begin", 0), ("before", 0), ("after", 0), ("step_end", 0),
        ("step_begin", 1), ("before", 1), ("after", 1), ("step_end", 1), ("step_begin", 2)]
    before, after = log[2], log[3]
    assert not torch.equal(before[2], after[2]) and torch.equal(before[3], after[3])
    assert torch.equal(log[6][2], after[2])


def test_step_begin_comes_before_the_first_forward():
    log = []
    tuned = tuned_with(log)
    tuned.optimizer()
    tuned.model(torch.randn(2, 4))
    assert [e[0] for e in log] == ["start", "step_begin"]
    with torch.no_grad():
        tuned.model(torch.randn(2, 4))                  # looking is no step
    assert len(log) == 2


def test_looking_before_training_starts_nothing():
    log = []
    tuned = tuned_with(log)
    tuned.optimizer()
    with torch.no_grad():
        tuned.model(torch.randn(2, 4))
    assert log == []


def test_gradients_accumulate_to_one_step():
    log = []
    tuned = tuned_with(log)
    opt = tuned.optimizer()
    for _ in range(3):
        tuned.model(torch.randn(2, 4)).sum().backward()
    opt.step()
    assert [e[0] for e in log] == ["start", "step_begin", "before", "after", "step_end",
                                   "step_begin"]


def test_no_timeline_without_an_optimizer():
    tuned = burnish.tune(nn.Sequential(nn.Linear(4, 4)), "full")
    with pytest.raises(ConfigError, match="tuned.optimizer"):
        tuned.timeline  # noqa: B018
