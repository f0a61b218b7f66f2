"""The schedule of what is live: draws, and the life of gradients and state."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from burnish.blocks.update.live import Draw, TrainableSchedule
from burnish.blocks.update.rules import AdamW
from burnish.blocks.update.step import InBackward, Inner, Subspace, compose
from burnish.blocks.update.subspace import SubspaceMap
from burnish.core.errors import ConfigError, RecipeError

NAMES = [f"b{i}" for i in range(8)]


def blocks():
    torch.manual_seed(0)
    return nn.ModuleDict({n: nn.Linear(12, 12) for n in NAMES[:4]})


def forward(model):
    x = torch.ones(3, 12)
    for layer in model.values():
        x = torch.tanh(layer(x))
    return x.square().mean()


def schedule(model, opt, live, **kw):
    return TrainableSchedule({n: m.parameters() for n, m in model.items()},
                             lambda step: live[step], optimizer=lambda: opt, **kw)


def test_a_draw_is_a_function_of_seed_and_period():
    draw = Draw(NAMES, 3, every=5, seed=1)
    first = [draw(s) for s in range(20)]
    assert [s for s, d in enumerate(first) if d is not None] == [0, 5, 10, 15]
    assert first == [Draw(NAMES, 3, 5, 1)(s) for s in range(20)]
    assert all(len(d) == 3 for d in first if d is not None)
    assert [Draw(NAMES, 3, 5, 2).period(k) for k in range(9)] != [draw.period(k) for k in range(9)]


def test_uniform_visits():
    n = 4000
    seen = Counter(b for k in range(n) for b in Draw(NAMES, 2, 1, 0).period(k))
    for b in NAMES:
        assert abs(seen[b] / n - 2 / 8) < 5 * (0.25 * 0.75 / n) ** 0.5


def test_weighted_visits_follow_sequential_sampling():
    names, w, n = NAMES[:3], (0.5, 0.3, 0.2), 4000
    seen = Counter(b for k in range(n) for b in Draw(names, 2, 1, 0, weights=w).period(k))
    for i, b in enumerate(names):
        p = w[i] + sum(w[j] * w[i] / (1 - w[j]) for j in range(3) if j != i)
        assert abs(seen[b] / n - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert len(Draw(names, 3, 1, 0, weights=(1.0, 0.0, 0.0)).period(0)) == 3


def test_impossible_draws_are_refused():
    with pytest.raises(RecipeError, match="cannot draw 9 of 8"):
        Draw(NAMES, 9, 1)
    with pytest.raises(RecipeError, match="period"):
        Draw(NAMES, 1, 0)


@pytest.mark.parametrize("answers", [[], [Inner(rule=AdamW(), state="8bit")]])
def test_what_leaves_loses_gradient_and_state(answers):
    model = blocks()
    opt = compose(answers, model.named_parameters(), 1e-2)
    s = schedule(model, opt, [{"b0", "b1"}, {"b1", "b2"}])
    s.update(0)
    forward(model).backward()
    opt.step()
    assert {p for p in opt.state if opt.state[p]} == {*model["b0"].parameters(),
                                                      *model["b1"].parameters()}
    s.update(1)                                       # gradients not zeroed yet
    assert not model["b0"].weight.requires_grad and model["b0"].weight.grad is None
    assert model["b0"].weight not in opt.state and model["b1"].weight in opt.state
    frozen = model["b0"].weight.detach().clone()
    opt.zero_grad()
    forward(model).backward()
    opt.step()
    assert torch.equal(frozen, model["b0"].weight)


def test_none_changes_nothing():
    model = blocks()
    s = schedule(model, None, [{"b0"}, None])
    assert s.update(0) == {"b0"} and s.update(1) == {"b0"}
    assert [m.weight.requires_grad for m in model.values()] == [True, False, False, False]


@pytest.mark.parametrize("how", ["cpu", "keep"])
def test_kept_state_comes_back_but_a_projector_does_not(how):
    model = blocks()
    low = Subspace(map=SubspaceMap(rank=2), where=lambda n, p: p.dim() > 1)
    opt = compose([low], model.named_parameters(), 1e-2)
    s = schedule(model, opt, [{"b0"}, {"b1"}, {"b0"}], state_on_leave=how)
    s.update(0)
    forward(model).backward()
    opt.step()
    moment = opt.state[model["b0"].weight]["exp_avg"].clone()
    s.update(1)
    held = opt.state[model["b0"].weight]
    assert torch.equal(held["exp_avg"], moment) and not any("projector" in k for k in held)
    s.update(2)
    assert torch.equal(opt.state[model["b0"].weight]["exp_avg"], moment)
    opt.zero_grad()
    forward(model).backward()
    opt.step()
    assert "projector.right" in opt.state[model["b0"].weight]
    assert opt.state[model["b0"].weight]["step"] == 2


def test_shared_tensors_live_while_any_group_does():
    a = nn.Parameter(torch.ones(2))
    s = TrainableSchedule({"x": [a], "y": [a]}, lambda step: [{"x"}, set()][step])
    s.update(0)
    assert a.requires_grad
    s.update(1)
    assert not a.requires_grad


def test_a_schedule_works_with_steps_in_backward():
    model = blocks()
    s = schedule(model, None, [{"b0"}, {"b3"}])
    s.update(0)
    opt = compose([InBackward()], model.named_parameters(), 1e-2)
    s._optimizer = lambda: opt
    for step in range(2):
        s.update(step)
        before = {n: m.weight.detach().clone() for n, m in model.items()}
        forward(model).backward()
        opt.step()
        moved = {n for n, m in model.items() if not torch.equal(before[n], m.weight)}
        assert moved == s.live


def test_resume_restores_what_is_live():
    model = blocks()
    s = schedule(model, None, [{"b2"}])
    s.update(0)
    other = blocks()
    t = schedule(other, None, [None])
    t.load_state_dict(s.state_dict())
    assert t.live == {"b2"}
    assert [m.weight.requires_grad for m in other.values()] == [False, False, True, False]


def test_wrong_words_are_named():
    with pytest.raises(ConfigError, match="drop"):
        schedule(blocks(), None, [], state_on_leave="dorp")
    with pytest.raises(ConfigError, match="b9"):
        schedule(blocks(), None, [{"b9"}]).update(0)
