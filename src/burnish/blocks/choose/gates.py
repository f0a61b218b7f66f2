"""Which updates are worth having, decided by gates that train beside them.

A handler of a run's events (core/events.py) over terms by name (blocks/weight/gated.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..update.live import TrainableSchedule
from ..update.noise import fold

GATES = "gates"


class Search:
    """Gates and factors take turns; then the best stay, without gates, and begin again.

    Until `warmup` of the run the factors train, then, until `search`, gates and factors by turns,
    an update each, on the batches as they come. Then of the terms of each block the share
    `density` (one at least) with the largest gates gets fresh factors, the others rank 0 and no
    longer train; gates are gone, and so is the optimizer's state. Of equal gates the earlier place
    stays. label: what fresh factors are drawn from, with the term's name. In a run of
    unknown length, or one with no update left for them, the factors train and nothing is decided.
    """

    def __init__(self, terms: Mapping[str, Any], resize: Any,
                 optimizer: Callable[[], torch.optim.Optimizer | None], *, warmup: float,
                 search: float, density: float, label: str):
        self.terms, self.resize, self.optimizer = terms, resize, optimizer
        self.warmup, self.search, self.density, self.label = warmup, search, density, label
        self.total: int | None = None
        groups: dict[str, list[nn.Parameter]] = {n: [t.A, t.B] for n, t in terms.items()}
        groups[GATES] = [t.gate for t in terms.values()]
        self.schedule = TrainableSchedule(groups, self.live, optimizer=optimizer,
                                          state_on_leave="keep")

    def start(self, total: int | None) -> None:
        self.total = total

    @property
    def decided(self) -> bool:
        return all(t.decided for t in self.terms.values())

    def turns(self) -> range:
        """The updates of the search, after which all is decided; the factors have one before."""
        total = self.total or 0
        first = max(1, round(self.warmup * total))
        end = max(first + 1, round(self.search * total))
        return range(first, end) if end < total and not self.decided else range(0)

    def live(self, step: int) -> frozenset[str]:
        """What trains in this update."""
        if step in self.turns()[::2]:
            return frozenset({GATES})
        return frozenset(n for n, t in self.terms.items() if t.rank)

    def step_begin(self, step: int) -> None:
        self.schedule.update(step)

    def after_update(self, step: int) -> None:
        if (turns := self.turns()) and step + 1 >= turns.stop:
            self.decide()

    def chosen(self) -> set[str]:
        """Names of the terms that stay."""
        blocks: dict[Any, list[str]] = {}
        for name, term in self.terms.items():
            blocks.setdefault(term.block, []).append(name)
        out: set[str] = set()
        for names in blocks.values():
            gates = {n: self.terms[n].gate for n in names}
            if not any(isinstance(g, FakeTensor) for g in gates.values()):
                names = sorted(names, key=lambda n: -float(gates[n].detach()))
            out.update(names[: max(1, round(self.density * len(names)))])
        return out

    @torch.no_grad()
    def decide(self) -> None:
        none, stay = torch.arange(0), self.chosen()
        for name, term in self.terms.items():
            g = torch.Generator().manual_seed(fold(self.label, name) >> 1)

            def drawn(*shape: int, g: torch.Generator = g) -> Tensor:
                return torch.rand(*shape, generator=g) * 2 - 1

            fresh = term.fresh(term.rank, drawn) if name in stay else None
            self.resize(term, keep=none, fresh=fresh)
            if (optimizer := self.optimizer()) is not None:
                for p in (term.A, term.B, term.gate):
                    optimizer.state.pop(p, None)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]
        self.schedule.load_state_dict(state["schedule"])
