"""Sparse updates that move: every so often the least of their entries leave, and others come.

The handler knows no method: `grow` says how many positions come where. What is dropped is gone,
what comes stands at zero, and moments go where entries go (rechosen.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..weight.rechosen import Rechosen, rechoose


class Seeking(Rechosen):
    """Entries that move, and where the gradient of those that do not train is largest.

    seek: so many are looked for in each backward (0: none), of which the last one counts.
    found: their positions, the largest first.  barred: positions nobody may come to, or None.
    fired: who has trained at any time, a bit an entry (None: nobody asks).
    """

    def __init__(self, *args: Any, fired: bool = False):
        super().__init__(*args)
        self.seek = 0
        self.barred: Tensor | None = None
        self._best: tuple[Tensor, Tensor] | None = None
        self.register_buffer("fired", torch.zeros(
            -(-self.out * self.inp // 8), dtype=torch.uint8, device=self.index.device)
            if fired else None)
        self.fire()

    @torch.no_grad()
    def fire(self) -> None:
        """Those that train now have trained."""
        if self.fired is not None:
            at = self.trained
            seen = self.ever()
            seen[at] = True
            weights = 2 ** torch.arange(8, device=at.device, dtype=torch.uint8)
            self.fired.copy_((seen.view(-1, 8) * weights).sum(1, dtype=torch.uint8))

    def ever(self) -> Tensor:
        """Truth values, one an entry (and up to seven more): has it trained at any time?"""
        bits = torch.arange(8, device=self.fired.device, dtype=torch.uint8)
        return (self.fired.unsqueeze(1) >> bits & 1).bool().flatten()

    def look_for(self, n: int) -> None:
        """From the next backward on; what was found before is forgotten."""
        self.seek, self._best = n, None

    @property
    def found(self) -> Tensor:
        return self.index.new_empty(0) if self._best is None else self._best[1]

    @property
    def looks(self) -> bool:
        return self.seek > 0

    def pull(self, i0: int, i1: int, G: Tensor, state: object,
             grads: list[Tensor | None]) -> Tensor:
        if self.seek:
            self._look(i0, i1, G)
        return super().pull(i0, i1, G, state, grads)

    @torch.no_grad()
    def _look(self, i0: int, i1: int, G: Tensor) -> None:
        size = G.abs()
        rows, cols, _ = self._inside(i0, i1, self.index.numel())
        size[rows, cols] = -1.0
        if self.barred is not None:
            rows, cols = self.barred // self.inp, self.barred % self.inp
            inside = (cols >= i0) & (cols < i1)
            size[rows[inside], cols[inside] - i0] = -1.0
        best = size.flatten().topk(min(self.seek, size.numel()))
        at = best.indices // (i1 - i0) * self.inp + best.indices % (i1 - i0) + i0
        if i0 and self._best is not None:
            score = torch.cat([self._best[0], best.values])
            chosen = score.topk(min(self.seek, score.numel()))
            self._best = chosen.values, torch.cat([self._best[1], at])[chosen.indices]
        else:
            self._best = best.values, at


class DropGrow:
    """Every `every` updates the share `drop` of each term's entries, the least in size, leave, and
    ``grow(term, n, step)`` says which n (or fewer) come instead; of a run of known length not after
    its last.

    looks: does `grow` read what the last backward has found? room: how many could come to a term.
    """

    def __init__(self, terms: Mapping[str, Seeking], resize: Any, every: int, drop: float,
                 grow: Callable[[Seeking, int, int], Tensor], room: Callable[[Seeking], int],
                 looks: bool):
        self.terms, self.resize, self.every, self.drop = terms, resize, every, drop
        self.grow, self.room, self.looks = grow, room, looks
        self.total: int | None = None
        self.at = 0

    def start(self, total: int | None) -> None:
        self.total = total

    def due(self, step: int) -> bool:
        """Do entries move after this update?"""
        return (step + 1) % self.every == 0 and step + 1 != self.total

    def moving(self, term: Seeking) -> int:
        """How many entries of a term do."""
        return min(int(self.drop * term.values.numel()), self.room(term))

    def step_begin(self, step: int) -> None:
        self.at = step
        self.seek(self.due(step))

    def rehearse(self, step: int) -> None:
        self.seek(True)

    def seek(self, wanted: bool) -> None:
        for term in self.terms.values():
            term.look_for(self.moving(term) if self.looks and wanted else 0)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        if not self.due(step):
            return
        for term in self.terms.values():
            n = self.moving(term)
            if n and not isinstance(term.values, FakeTensor):
                come = self.grow(term, n, step)          # fewer where a layer has not run
                stay = torch.ones_like(term.values, dtype=torch.bool)
                stay[term.values.abs().argsort(stable=True)[: come.numel()]] = False
                rechoose(term, self.resize, stay, come)
                term.fire()

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]
        self.step_begin(state["at"])
