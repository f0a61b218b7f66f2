"""Zeroth-order steps against an anchor: what one batch says too much is what it says there too.

    at an anchor theta~, on large data:  g~ = SPSA(theta~, z~)
    on a batch:                          G = (SPSA(theta, z) - SPSA(theta~, z)) z + g~ z~

The mean of G over z, z~ and batches is the gradient at theta, and its variance over batches falls
with the distance from the anchor. The anchor is kept, one number a weight; g~ and z~ are the log's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.errors import FormatError, RecipeError
from .noise import as_fp32
from .plan import Plan
from .rules import SGD, Rule
from .scratch import Evaluate
from .zeroth import ZerothOrder
from .zoo import Zoo, ZooOptimizer


@dataclass(frozen=True, kw_only=True)
class Svrg(Zoo):
    """The innermost answer of an anchored step.

    every: updates of a period.  batches: those of them, its first, that probe the anchor, each on
    its own batch along the same z~; the mean is g~.  anchor_rate: times lr, the rate of the moves
    ``g~ z~`` that they make.
    """

    honours: ClassVar[frozenset[str]] = frozenset({"objective", "rounding", "groups"})
    why: ClassVar[Mapping[str, str]] = {
        **ZerothOrder.why,
        "schedule": "what joins within a period has no anchor and no part in its slope"}

    rule: Rule | None = SGD()
    every: int = 2
    batches: int = 1
    anchor_rate: float = 1.0
    name: str = "mezo_svrg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.batches < self.every:
            raise RecipeError(f"{self.name}: a period of every={self.every} updates begins with "
                              f"batches={self.batches} at the anchor; expected at least 1, and "
                              "fewer than every")
        if self.anchor_rate <= 0:
            raise RecipeError(f"{self.name}: anchor_rate is positive, got {self.anchor_rate:g}")
        if self.one_sided or self.unit != "whole" or self.sparsity or self.size != "none" \
                or self.mode != "scratch" or self.scalar_sign or self.rule is None:
            raise RecipeError(f"{self.name}: probes of an anchor are two-sided, of the whole, "
                              "without masks or sizes, and beside the stored weights; a rule "
                              "makes the step")

    def make(self, groups: list[dict[str, Any]], plan: Plan, seed: int) -> SvrgOptimizer:
        return SvrgOptimizer(groups, self, plan, seed)


class SvrgOptimizer(ZooOptimizer):
    """See the module. State of a parameter: the anchor, and what its rule keeps."""

    spec: Svrg
    TOLD: ClassVar[tuple[str, ...]] = (*ZooOptimizer.TOLD, "every", "batches")

    def __init__(self, groups: list[dict[str, Any]], spec: Svrg, plan: Plan, seed: int):
        super().__init__(groups, spec, plan, seed)
        self._told: dict[int, float] = {}           # seed -> g of the anchor's probes

    def _since(self, update: int) -> int:
        """Updates since the period began."""
        return update % self.spec.every

    def _seed(self, update: int, query: int, unit: int) -> int:
        since = self._since(update)
        return super()._seed(update - since if since < self.spec.batches else update, query, unit)

    def _rates(self, update: int) -> list[float]:
        factor = self.spec.anchor_rate if self._since(update) < self.spec.batches else 1.0
        return [lr * factor for lr in super()._rates(update)]

    def _pair(self, seed: int, eps: float) -> Generator[Evaluate, float, tuple[float, float]]:
        """The losses, of which half of what the anchor's differ by is taken: the difference of
        those at theta becomes a difference of differences, and their mean stays."""
        since = self._since(self.param_groups[0]["updates"])
        if since == 0:
            return (yield from super()._pair(seed, eps))     # theta is the anchor
        up = down = 0.0
        if since >= self.spec.batches:
            up, down = yield from super()._pair(seed, eps)
        self._there = {n: self.state[p]["anchor"].to(p.dtype) for n, p in self.named()}
        try:
            above, below = yield from super()._pair(seed, eps)
        finally:
            self._there = {}
        if since < self.spec.batches:
            return above, below
        half = (above - below) / 2
        return up - half, down + half

    def _decided(self, seeds: list[int], found: list[float], lrs: list[float]
                 ) -> Generator[Evaluate, float, list[float]]:
        yield from ()
        if self._since(self.param_groups[0]["updates"]) >= self.spec.batches:
            return found
        return [as_fp32(g / self.spec.batches) for g in found]

    def _take(self, seeds: list[int], found: list[float], lrs: Sequence[float], index: int,
              rest: frozenset[str] | None = None) -> None:
        since = self._since(index // self.spec.queries)
        if since == 0:
            self._anchored()
        if since < self.spec.batches:
            self._learn(seeds, found)
        elif not self._told:
            raise FormatError(f"{self.spec.name}: the log begins between two anchors, and what "
                              "the first found is not in it; repeat the whole run")
        else:
            seeds, found = [*seeds, *self._told], [*found, *self._told.values()]
        super()._take(seeds, found, lrs, index, rest)

    @torch.no_grad()
    def _anchored(self) -> None:
        """The anchor is where the weights stand now."""
        self._told = {}
        for _, p in self._all():
            state = self.state[p]
            if "anchor" in state:
                state["anchor"].copy_(p.detach())
            else:
                state["anchor"] = p.detach().clone()

    def _learn(self, seeds: Sequence[int], found: Sequence[float]) -> None:
        for s, g in zip(seeds, found, strict=True):
            self._told[s] = self._told.get(s, 0.0) + g

    def load_extra_state(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        super().load_extra_state(tensors, header)
        q, first = self.spec.queries, int(header.get("first_update", 0))
        ended = first + len(self.log) // q
        begun = (ended - self._since(ended) - first) * q     # of this period, in the log
        self._told = {}
        if begun >= 0:
            stop = begun + self.spec.batches * q
            self._learn(self.log.seeds[begun:stop], self.log.scalars[begun:stop])
