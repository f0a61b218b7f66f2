"""What is live between steps, and what happens to the rest: a schedule that owns life-cycles.

A policy answers "which groups of tensors train at this step?"; the schedule carries the answer
out. A tensor that joins gets requires_grad; one that leaves loses requires_grad, its gradient AND
its optimizer state. That last part is what toggling requires_grad alone forgets: moments of every
block that was ever live would stay, and after a few periods nothing would have been saved.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, RecipeError, nearest
from ...core.events import EARLY
from .noise import fold

OnLeave = Literal["drop", "cpu", "keep"]
Policy = Callable[[int], frozenset[str] | None]

_ON_LEAVE = ("drop", "cpu", "keep")


@dataclass(frozen=True)
class Draw:
    """`count` of `names` without replacement, drawn anew every `every` steps, from step 0 on.

    The draw of period k depends on (seed, k) alone: every rank draws the same, a resumed run
    draws what the uninterrupted one would have, and nothing touches a global generator.
    weights: relative, for sequential weighted sampling; None is uniform.
    """

    names: Sequence[str]
    count: int
    every: int
    seed: int = 0
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.count <= len(self.names):
            raise RecipeError(f"cannot draw {self.count} of {len(self.names)} blocks")
        if self.every < 1:
            raise RecipeError(f"a period has at least 1 step, got {self.every}")

    def __call__(self, step: int) -> frozenset[str] | None:
        return self.period(step // self.every) if step % self.every == 0 else None

    def period(self, k: int) -> frozenset[str]:
        rng = random.Random(fold("draw", self.seed, k))
        if self.weights is None:
            return frozenset(rng.sample(list(self.names), self.count))
        pool = {n: w + 1e-8 for n, w in zip(self.names, self.weights, strict=True)}
        chosen = []
        for _ in range(self.count):
            name = rng.choices(list(pool), list(pool.values()))[0]
            del pool[name]
            chosen.append(name)
        return frozenset(chosen)


Order = Literal["descending", "ascending", "random"]


@dataclass(frozen=True)
class InTurn:
    """One of `names` for `every` steps, from step 0 on, until all have been; then again.

    order: from the last one on, from the first, or as a round is drawn from (seed, round) alone.
    """

    names: Sequence[str]
    every: int
    order: Order = "descending"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RecipeError(f"a period has at least 1 step, got {self.every}")

    def __call__(self, step: int) -> frozenset[str] | None:
        return self.period(step // self.every) if step % self.every == 0 else None

    def period(self, k: int) -> frozenset[str]:
        names = list(self.names)
        turn, place = divmod(k, len(names))
        if self.order == "descending":
            names.reverse()
        elif self.order == "random":
            random.Random(fold("in turn", self.seed, turn)).shuffle(names)
        return frozenset({names[place]})


class TrainableSchedule:
    """Carries a policy out on named groups of parameters.

    groups: name -> the parameters that live and leave together. A parameter in several groups
        lives while any of them does.
    policy: step -> names of the live groups, or None for no change.
    optimizer: called when needed for the current optimizer; may return None.
    state_on_leave: "drop" frees the state, "cpu" moves it to the host and back, "keep" leaves it.
        Projectors are dropped in any case: a stale basis is worse than a new one.
    """

    def __init__(self, groups: Mapping[str, Iterable[nn.Parameter]], policy: Policy, *,
                 optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None,
                 state_on_leave: OnLeave = "drop"):
        if state_on_leave not in _ON_LEAVE:
            raise ConfigError(f"state_on_leave={state_on_leave!r}: expected one of "
                              f"{', '.join(_ON_LEAVE)}{nearest(state_on_leave, _ON_LEAVE)}")
        self.groups = {n: list(ps) for n, ps in groups.items()}
        self.policy, self.state_on_leave = policy, state_on_leave
        self._optimizer = optimizer
        self.live: frozenset[str] | None = None       # None: nothing decided yet

    def update(self, step: int) -> frozenset[str]:
        """Ask the policy about `step` and carry its answer out; returns the live groups."""
        answer = self.policy(step)
        if answer is not None:
            self.set(answer)
        return self.live if self.live is not None else frozenset(self.groups)

    def set(self, live: Iterable[str]) -> None:
        """Make exactly these groups live."""
        live = frozenset(live)
        if unknown := live - set(self.groups):
            raise ConfigError(f"no group {sorted(unknown)[0]!r} to make live"
                              f"{nearest(sorted(unknown)[0], self.groups)}")
        stays = {id(p) for n in live for p in self.groups[n]}
        for name in self.groups:
            for p in self.groups[name]:
                if id(p) in stays:
                    self._join(p)
                else:
                    self._leave(p)
        self.live = live

    def _join(self, p: nn.Parameter) -> None:
        vars(p).pop("burnish_resting", None)
        p.requires_grad_(True)
        if self.state_on_leave == "cpu" and (state := self._state(p)):
            _move(state, p.device)

    def _leave(self, p: nn.Parameter) -> None:
        p.burnish_resting = True                      # it trains, only not now
        p.requires_grad_(False)
        p.grad = None
        state = self._state(p)
        if state is None:
            return
        if self.state_on_leave == "drop":
            self._optimizer().state.pop(p)            # type: ignore[union-attr]
            return
        for key in [k for k in state if k.startswith("projector.") or k == "folded"]:
            del state[key]
        if self.state_on_leave == "cpu":
            _move(state, torch.device("cpu"))

    def _state(self, p: nn.Parameter) -> dict[str, Any] | None:
        optimizer = self._optimizer()
        return None if optimizer is None or p not in optimizer.state else optimizer.state[p]

    def state_dict(self) -> dict[str, Any]:
        return {"live": None if self.live is None else sorted(self.live)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["live"] is not None:
            self.set(state["live"])


@dataclass(frozen=True)
class LiveBlocks:
    """Asks the schedule before every step; early, so that other handlers see what is live.

    dearest: what is live in steps that stand for all others in a promise; None: what would be.
    """

    schedule: TrainableSchedule
    dearest: frozenset[str] | None = None
    phase: ClassVar[int] = EARLY

    def step_begin(self, step: int) -> None:
        self.schedule.update(step)

    def rehearse(self, step: int) -> None:
        if self.dearest is not None:
            self.schedule.set(self.dearest)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)


def _move(state: dict[str, Any], device: torch.device) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = value.to(device)
