"""Which units of a model live: their importance by a low-rank update's gradients, and a choice.

A unit (core/groups.py) is a head or an inner channel: rows of some matrices, columns of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.groups import Group
from .score import factor_importance

if TYPE_CHECKING:
    from ...core.site import Place
    from ..state.mask import UnitMask
    from ..weight.factor import Chain


def unit_importance(group: Group, terms: Mapping[str, Chain], weight: Callable[[Place], Tensor]
                    ) -> Tensor | None:
    """(units,): a unit's sums over its rows of the matrices that make it and its columns of the one
    that reads it, of ``|G * W'|`` by this update's gradients, each matrix's divided by their l2
    norm; None where no term has gradients.

    terms: by the names of places. weight: the frozen weight of a place.
    """
    parts: list[Tensor] = []
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for side, members in ((0, group.rows), (1, group.columns)):
        for place, width in members:
            whole = replace(place, rows=None)                # one term may serve a fused weight
            at = place if place.name in terms else whole
            term = terms.get(at.name)
            if term is None or term.A.grad is None or term.B.grad is None:
                continue
            if at.name not in made:                          # q, k and v of one fused weight
                made[at.name] = factor_importance(weight(at), term.A, term.B, term.A.grad,
                                                  term.B.grad, term.scale)
            sums = made[at.name][side]
            if at is whole and place.rows:
                sums = sums[place.rows[0] : place.rows[1]]
            units = sums.view(group.units, width).sum(1)
            parts.append(units / torch.linalg.vector_norm(units).clamp(min=1e-30))
    return torch.stack(parts).sum(0) if parts else None


def off(share: float, units: int) -> int:
    """How many of so many a share is, rounded down; one always lives."""
    return min(int(share * units + 1e-9), units - 1)


@torch.no_grad()
def switch_off(mask: UnitMask, score: Tensor, share: float) -> None:
    """The ``floor(share units)`` weakest by score are off, the others on; one always lives."""
    alive = torch.ones_like(mask.alive)
    alive[score.argsort(stable=True)[: off(share, len(score))]] = False
    mask.alive.copy_(alive)


class Pruner:
    """A handler of events: importance smoothed as ``I <- decay I + (1 - decay) I_now`` at every
    update, and every `every` updates (and at the last) a choice by it.

    masks: one per group. ratio: (step, updates of the run) -> the share that is off. Without the
    number of updates nothing is done.
    """

    def __init__(self, groups: Sequence[Group], masks: Sequence[UnitMask],
                 importance: Callable[[Group], Tensor | None],
                 ratio: Callable[[int, int], float], every: int, decay: float):
        self.groups, self.masks, self.now, self.ratio = groups, masks, importance, ratio
        self.every, self.decay = every, decay
        self.importance: list[Tensor | None] = [None] * len(groups)
        self.total: int | None = None

    def start(self, total: int | None) -> None:
        self.total = total

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        if self.total is None:
            return
        for i, group in enumerate(self.groups):
            now, old, d = self.now(group), self.importance[i], self.decay
            if now is not None:
                self.importance[i] = now if old is None else d * old + (1 - d) * now

    def after_update(self, step: int) -> None:
        if self.total is None or (step + 1) % self.every and step + 1 != self.total:
            return
        share = self.ratio(step + 1, self.total)
        for mask, score in zip(self.masks, self.importance, strict=True):
            if score is not None:
                switch_off(mask, score, share)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "importance": self.importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.importance = state["total"], list(state["importance"])
