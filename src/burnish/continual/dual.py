"""Two sets of values for the same tensors: fast ones, which train, and slow ones, which follow.

    slow <- keep slow + (1 - keep) fast

A rule says `keep` for each time. LAE's offline module, I-LoRA's long-term one and the slow weights
of a learner of few shots are this pair with other rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RecipeError

#: number of this time, from 1 -> what the slow set keeps of itself
Rule = Callable[[int], float]


def constant(keep: float) -> Rule:
    """A running mean that forgets: LAE (0.9999)."""
    return lambda n: keep


def warmed(keep: float) -> Rule:
    """The mean of the first values, then a running one: min(1 - 1 / (n + 1), keep), I-LoRA's."""
    return lambda n: min(1 - 1 / (n + 1), keep)


def step(rate: float) -> Rule:
    """``slow += rate (fast - slow)``, a step of Reptile."""
    return lambda n: 1 - rate


@torch.no_grad()
def along(fast: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], end: Mapping[str, Tensor],
          read: Callable[[], float], points: int = 11) -> list[tuple[float, float]]:
    """(b, what is read) with ``(1 - b) start + b end`` in the model, b from 0 to 1: are two sets of
    values joined by a path of low loss? What stood there comes back bit for bit."""
    if points < 2:
        raise ConfigError(f"points={points}: a path has two ends, expected 2 or more")
    held = {n: p.detach().clone() for n, p in fast.items()}
    out = []
    try:
        for i in range(points):
            b = i / (points - 1)
            for n, p in fast.items():
                p.copy_(torch.lerp(start[n], end[n], b))
            out.append((b, float(read())))
    finally:
        for n, p in fast.items():
            p.copy_(held[n])
    return out


class DualWeights:
    """The slow values of tensors, a copy of the fast ones to begin with.

    fast: name -> the parameter that trains. It stays where it is; `standing` lets the slow values
    answer in its place for a while.
    """

    def __init__(self, fast: Mapping[str, nn.Parameter], rule: Rule):
        if not fast:
            raise RecipeError("nothing trains whose values could be followed")
        self.fast, self.rule, self.times = dict(fast), rule, 0
        self.slow = {n: p.detach().clone() for n, p in self.fast.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Once more, in at least the precision of float32."""
        self._same()
        self.times += 1
        keep = self.rule(self.times)
        for n, slow in self.slow.items():
            fast = self.fast[n].detach()
            wide = torch.promote_types(slow.dtype, torch.float32)
            if keep == 0:
                slow.copy_(fast)
            elif keep != 1:
                slow.copy_(torch.lerp(slow.to(wide), fast.to(wide), 1 - keep))

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, the slow values stand in the model; the fast ones come back bit for bit."""
        self._same()
        held = {n: p.detach().clone() for n, p in self.fast.items()}
        try:
            self._put(self.slow)
            yield
        finally:
            self._put(held)

    def adopt(self) -> None:
        """The fast values become the slow ones."""
        self._same()
        self._put(self.slow)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for n, p in self.fast.items():
            p.copy_(values[n])

    def _same(self) -> None:
        for n, p in self.fast.items():
            if p.shape != self.slow[n].shape:
                raise RecipeError(f"{n} was {tuple(self.slow[n].shape)} and is {tuple(p.shape)} "
                                  "now: values are followed where sizes stay, leave out what "
                                  "changes a rank")
