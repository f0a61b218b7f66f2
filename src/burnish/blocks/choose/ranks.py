"""Ranks that change while they train: components that compete, and terms that grow.

    Shrinking   a budget falls; the components with the least score rest, and go in the end
    Rising      every so often the terms with the highest score gain components

Both are handlers of a run's events (core/events.py) over terms by name, and know neither the term's
equation nor how its importance is read: they are given ``resize(term, keep=, fresh=)``, which takes
gradients, moments and files along. State is what a checkpoint needs beside the ranks themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...core.errors import RecipeError
from ..update.noise import fold
from .budget import cubic
from .score import Smoothed, sensitivity


@dataclass(frozen=True)
class Falling:
    """b(t): from `start` to `end` as a cubic between `warmup` and 1 - `cooldown` of the run."""

    start: float
    end: float
    warmup: float
    cooldown: float

    def at(self, step: int, total: int) -> float:
        return cubic(self.start, self.end, step, self.warmup * total,
                     total - self.cooldown * total)

    def last(self, total: int) -> int:
        """The update after which nothing falls any more; the run's last at the latest."""
        return min(total - int(self.cooldown * total), total - 1)


class Shrinking:
    """Components of all terms compete for a budget that falls; in the end the losers go for good.

    score(*smoothed): from the smoothed ``|theta dtheta|`` of a term's tensors, in the order of
    ``theta()``, one number per component. rest(term, alive): called every `every` updates with a
    mask of those among the ``b(t)`` best (per term on average) of all; they may come back. After
    the last fall the tensors keep the ``b`` best, exactly: ties are broken by place. Without a
    known number of updates nothing falls.
    """

    def __init__(self, terms: Mapping[str, Any], resize: Any, budget: Falling, every: int,
                 score: Callable[..., Tensor], rest: Callable[[Any, Tensor], None]):
        self.terms, self.resize, self.falling, self.every = terms, resize, budget, every
        self.score, self.rest = score, rest
        self.total: int | None = None
        self.fixed = False                               # the losers are gone for good
        self._attend()

    def _attend(self) -> None:
        """Scores of every tensor, while there is something to decide."""
        terms = {} if self.fixed else self.terms
        self.scores = {n: [Smoothed() for _ in t.theta()] for n, t in terms.items()}
        self._of = {p: s for n, t in terms.items()
                    for p, s in zip(t.theta(), self.scores[n], strict=True)}

    def start(self, total: int | None) -> None:
        self.total = total

    def budget(self, step: int) -> int:
        """Components alive over all terms; in a run of unknown length nothing falls."""
        f, n = self.falling, len(self.terms)
        if self.total is None:
            return int(f.start * n)
        return int(Falling(f.start * n, f.end * n, f.warmup, f.cooldown).at(step, self.total))

    def tensor_updated(self, p: nn.Parameter, grad: Tensor) -> None:
        if (smoothed := self._of.get(p)) is not None:
            smoothed.update(sensitivity(p, grad))

    def after_update(self, step: int) -> None:
        if self.total is None or self.fixed:
            return
        if step >= self.falling.last(self.total):
            for name, alive in self.pattern(int(self.falling.end * len(self.terms))).items():
                self.resize(self.terms[name], keep=alive.nonzero().squeeze(1))
            self.fixed = True
            self._attend()
        elif step > self.falling.warmup * self.total and step % self.every == 0:
            for name, alive in self.pattern(self.budget(step)).items():
                self.rest(self.terms[name], alive)

    @torch.no_grad()
    def pattern(self, budget: int) -> dict[str, Tensor]:
        """Which components are among the `budget` best of all."""
        rows = [self.score(*(s.score() for s in self.scores[n])) for n in self.terms]
        flat = torch.cat(rows)
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[flat.argsort(descending=True, stable=True)[:budget]] = True
        return dict(zip(self.terms, mask.split([r.numel() for r in rows]), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "fixed": self.fixed,
                "scores": {n: [s.state() for s in ss] for n, ss in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.fixed = state["total"], state["fixed"]
        self._attend()
        for n, ss in self.scores.items():
            for s, saved in zip(ss, state["scores"][n], strict=True):
                s.load(saved)


class Grows(Protocol):
    """A term that gains components. It adds to `score` in backward while `scoring`."""

    scoring: bool
    score: Tensor | float

    def importance(self) -> Tensor | float:
        """What `score` makes of the term beside others."""

    @property
    def rank(self) -> int:
        """Components that count."""

    @property
    def most(self) -> int:
        """The rank it can have."""

    def fresh(self, n: int, drawn: Callable[..., Tensor]) -> Mapping[str, Tensor]:
        """n further components, tensor by tensor; ``drawn(*shape)`` is normal with std 0.02."""

    def grown(self, n: int) -> None:
        """They are there."""

    def done(self) -> Mapping[str, Tensor] | None:
        """It grows no more: what stays of each tensor; None: all."""


class Rising:
    """The terms that matter gain components, until the ranks sum to `goal`.

    After every update each term's score is smoothed as I' U. After `warmup` updates, every `every`,
    the `top` terms of the highest that still can gain `grow` components; scoring ends with the
    growth. label: what fresh components are drawn from, with the term's name and the step. Raises
    RecipeError at the start of a run that is known to end before `warmup`: nothing would grow.
    """

    def __init__(self, terms: Mapping[str, Any], resize: Any, *, goal: int, grow: int, top: int,
                 warmup: int, every: int, label: str):
        self.terms, self.resize, self.goal, self.label = terms, resize, goal, label
        self.grow, self.top, self.warmup, self.every = grow, top, warmup, every
        self.scores = {n: Smoothed() for n in terms}
        self._listen()

    def start(self, total: int | None) -> None:
        if total is not None and self.left > 0 and max(self.warmup, 1) > total:
            raise RecipeError(f"{self.label} grows from update {max(self.warmup, 1)} on, and the "
                              f"run has {total}: nothing would grow; try warmup={total // 8}, "
                              f"every={max(1, total // 16)}")

    @property
    def left(self) -> int:
        """Components still to be given."""
        return self.goal - sum(t.rank for t in self.terms.values())

    def _listen(self) -> None:
        for term in self.terms.values():
            term.scoring, term.score = self.left > 0, 0.0

    def after_update(self, step: int) -> None:
        if self.left <= 0:
            return
        for name, term in self.terms.items():
            self.scores[name].update(torch.as_tensor(term.importance()).reshape(1).float())
            term.score = 0.0
        done = step + 1
        if done >= self.warmup and (done - self.warmup) % self.every == 0:
            self.rise(step)

    @torch.no_grad()
    def rise(self, step: int) -> None:
        scores = {n: s.score() for n, s in self.scores.items()}
        fake = any(isinstance(s, FakeTensor) for s in scores.values())     # their order is unknown
        ranked = list(scores) if fake else sorted(scores, key=lambda n: -float(scores[n]))
        able = [n for n in ranked if self.terms[n].rank < self.terms[n].most]
        for name in able[: self.top]:
            if (n := min(self.grow, self.left)) > 0:
                self._gain(name, n, step)
        if self.left <= 0:
            for term in self.terms.values():
                if (keep := term.done()) is not None:
                    self.resize(term, keep=keep)
            self._listen()

    def _gain(self, name: str, n: int, step: int) -> None:
        g = torch.Generator().manual_seed(fold(self.label, name, step) >> 1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g) * 0.02

        term = self.terms[name]
        self.resize(term, fresh=term.fresh(n, drawn))
        term.grown(n)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": {n: s.state() for n, s in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for n, s in self.scores.items():
            s.load(state["scores"][n])
        self._listen()
