"""Which width of each layer trains: one configuration an update, the rest at rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch

from ...core.events import EARLY
from ..choose.genes import Genes
from ..weight.widths import Chains, Grids, choose
from .live import TrainableSchedule


class DrawnWidths:
    """``draw(step, weights of each layer)`` says the widths of an update. Early, so that other
    handlers see what is live. What rests has no gradient, and its moments wait on the host.

    layers: what holds a layer's weight and what is added to it, by name.
    """

    phase: ClassVar[int] = EARLY

    def __init__(self, layers: Mapping[str, tuple[Grids, Chains]],
                 draw: Callable[[int, list[int]], Genes],
                 optimizer: Callable[[], torch.optim.Optimizer | None]):
        self.layers, self.draw, self.filling = layers, draw, False
        groups = {f"{n}/{b}": term.factors_of(b) for n, (_, term) in layers.items()
                  for b in term.widths}
        self.schedule = TrainableSchedule(groups, lambda step: None, state_on_leave="cpu",
                                          optimizer=optimizer)

    def set(self, genes: Iterable[int]) -> None:
        chosen = dict(zip(self.layers, genes, strict=True))
        choose(self.layers, chosen)
        self.schedule.set({f"{n}/{b}" for n, b in chosen.items()})

    def step_begin(self, step: int) -> None:
        genes = self.draw(step, [t.size for _, t in self.layers.values()])
        left = [q.widths for q, _ in self.layers.values()]       # one alone behind an export
        self.set(b if b in there else there[0] for b, there in zip(genes, left, strict=True))

    def rehearse(self, step: int) -> None:
        self.filling = not step
        self.set(q.widths[-1] for q, _ in self.layers.values())

    def before_update(self, step: int) -> None:
        if self.filling:                             # in the end all factors have moments
            for group in self.schedule.groups.values():
                for p in group:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.filling = False

    def told(self) -> Mapping[str, Any]:
        return {"bits": {n: q.chosen for n, (q, _) in self.layers.items()}}

    def state_dict(self) -> Mapping[str, Any]:
        return {"bits": [q.chosen for q, _ in self.layers.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.set(state["bits"])
