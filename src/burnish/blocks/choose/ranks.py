"""Ranks that change while they train: components that compete, and terms that grow.

    Shrinking   a budget falls; the components with the least score rest, and go in the end
    Rising      every so often the terms with the highest score gain components
    Widening    the same by a norm of what they have learnt, and more of them as the run goes on

All are handlers of a run's events (core/events.py) over terms by name, and know neither the term's
equation nor how its importance is read: they are given ``resize(term, keep=, fresh=)``, which takes
gradients, moments and files along. State is what a checkpoint needs beside the ranks themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


class Widens(Protocol):
    """A term that gains components."""

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


class Grows(Widens, Protocol):
    """It adds to `score` in backward while `scoring`."""

    scoring: bool
    score: Tensor | float

    def importance(self) -> Tensor | float:
        """What `score` makes of the term beside others."""

    def done(self) -> Mapping[str, Tensor] | None:
        """It grows no more: what stays of each tensor; None: all."""


class Growth:
    """Terms that gain `grow` components at a time, until the ranks sum to `goal`.

    None gains more than it can have, and the last to gain what is left. label: what fresh
    components are drawn from, with the term's name and the step. A promise is of the ranks in the
    end, as many for each.
    """

    def __init__(self, terms: Mapping[str, Any], resize: Any, goal: int, grow: int, label: str):
        self.terms, self.resize, self.label = terms, resize, label
        self.goal, self.grow = goal, grow

    @property
    def left(self) -> int:
        """Components still to be given."""
        return self.goal - sum(t.rank for t in self.terms.values())

    def able(self, names: Iterable[str]) -> list[str]:
        """Those of them that can gain."""
        return [n for n in names if self.terms[n].rank < self.terms[n].most]

    @torch.no_grad()
    def widen(self, names: Iterable[str], step: int) -> None:
        """These gain, in this order."""
        for name in names:
            term = self.terms[name]
            if (n := min(self.grow, self.left, term.most - term.rank)) > 0:
                g = torch.Generator().manual_seed(fold(self.label, name, step) >> 1)

                def drawn(*shape: int, g: torch.Generator = g) -> Tensor:
                    return torch.randn(*shape, generator=g) * 0.02

                self.resize(term, fresh=term.fresh(n, drawn))
                term.grown(n)

    def rehearse(self, step: int) -> None:
        for _ in range(self.left):
            able = self.able(self.terms)
            self.widen(sorted(able, key=lambda n: self.terms[n].rank), step)


def by_worth(worth: Mapping[str, Tensor]) -> list[str]:
    """Names, those of the highest first; in a simulation their order is unknown."""
    if any(isinstance(w, FakeTensor) for w in worth.values()):
        return list(worth)
    return sorted(worth, key=lambda n: -float(worth[n]))


class Rising(Growth):
    """The terms that matter gain components.

    After every update each term's score is smoothed as I' U. After `warmup` updates, every `every`,
    the `top` terms of the highest that still can gain `grow` components; scoring ends with the
    growth. Raises RecipeError at the start of a run that is known to end before `warmup`: nothing
    would grow.
    """

    def __init__(self, terms: Mapping[str, Any], resize: Any, *, goal: int, grow: int, top: int,
                 warmup: int, every: int, label: str):
        super().__init__(terms, resize, goal, grow, label)
        self.top, self.warmup, self.every = top, warmup, every
        self.scores = {n: Smoothed() for n in terms}
        self._listen()

    def start(self, total: int | None) -> None:
        if total is not None and self.left > 0 and max(self.warmup, 1) > total:
            raise RecipeError(f"{self.label} grows from update {max(self.warmup, 1)} on, and the "
                              f"run has {total}: nothing would grow; try warmup={total // 8}, "
                              f"every={max(1, total // 16)}")

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
        ranked = by_worth({n: s.score() for n, s in self.scores.items()})
        self.widen(self.able(ranked)[: self.top], step)
        if self.left <= 0:
            for term in self.terms.values():
                if (keep := term.done()) is not None:
                    self.resize(term, keep=keep)
            self._listen()

    def state_dict(self) -> dict[str, Any]:
        return {"scores": {n: s.state() for n, s in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for n, s in self.scores.items():
            s.load(state["scores"][n])
        self._listen()


class Widening(Growth):
    """The terms whose :meth:`extent` rose most gain components, more of them as the run goes on.

    After `warmup` of the run, every `every` updates: with left components still to be given and c
    the share of the way from there to the end, ``floor(c left)`` terms gain, or ``floor(left^c)``
    where not `linear`; one at least. Those whose extent has risen most since the time before, of
    those that can. Without a known number of updates nothing grows.
    """

    def __init__(self, terms: Mapping[str, Any], resize: Any, *, goal: int, grow: int,
                 warmup: float, every: int, linear: bool, label: str):
        super().__init__(terms, resize, goal, grow, label)
        self.warmup, self.every, self.linear = warmup, every, linear
        self.total: int | None = None
        self.before: dict[str, Tensor] = {}

    def start(self, total: int | None) -> None:
        self.total = total

    def after_update(self, step: int) -> None:
        if self.total is None or self.left <= 0:
            return
        begin, done = round(self.warmup * self.total), step + 1
        if done >= begin and (done - begin) % self.every == 0:
            self.rise(step, self.top((done - begin) / max(1, self.total - begin)))

    def top(self, c: float) -> int:
        """How many terms gain at a share c of the way."""
        return max(1, int(self.left * c if self.linear else self.left**c))

    @torch.no_grad()
    def rise(self, step: int, top: int) -> None:
        now = {n: t.extent() for n, t in self.terms.items()}
        ranked = by_worth({n: v - self.before[n] if n in self.before else v
                           for n, v in now.items()})
        self.before = now
        self.widen(self.able(ranked)[:top], step)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.before = state["total"], dict(state["before"])
