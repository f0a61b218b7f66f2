"""How alike the states behind the blocks of a stack are, and runs of blocks that are alike.

    CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F),   X, Y (n, d), columns centred

of rows that come batch by batch: sums of x, y and of their products in fp64, d x d of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batches import call, inputs
from ...core.errors import ConfigError
from ..state.taps import evaluating

Run = tuple[int, int]


class Cka:
    """Of neighbours in a row of states: ``add([(n, d), ...])``, then ``values()``, one a pair."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: list[Tensor] = []
        self.own: list[Tensor] = []
        self.cross: list[Tensor] = []

    def add(self, states: Sequence[Tensor]) -> None:
        wide = [x.detach().double() for x in states]
        sums, own = [x.sum(0) for x in wide], [x.t() @ x for x in wide]
        cross = [y.t() @ x for x, y in zip(wide, wide[1:], strict=False)]
        self.n += len(wide[0])
        for held, new in ((self.sums, sums), (self.own, own), (self.cross, cross)):
            held[:] = [a + b for a, b in zip(held, new, strict=True)] if held else new

    def values(self) -> list[float]:
        """0 for a pair one of which is the same everywhere."""
        norms = [float((g - torch.outer(s, s) / self.n).norm())
                 for g, s in zip(self.own, self.sums, strict=True)]
        moves = [a > 1e-12 * float(g.norm()) for a, g in zip(norms, self.own, strict=True)]
        return [float((c - torch.outer(self.sums[i + 1], self.sums[i]) / self.n).square().sum())
                / (norms[i] * norms[i + 1]) if moves[i] and moves[i + 1] else 0.0
                for i, c in enumerate(self.cross)]


@torch.no_grad()
def neighbours(model: nn.Module, paths: Sequence[str], batches: Iterable[Any], who: str
               ) -> list[float]:
    """CKA of the states behind each of these blocks and the next, over the tokens that the
    attention mask counts. The model answers in evaluation mode and is what it was."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def heard(module: nn.Module, args: Any, out: Any) -> None:
            seen[path] = out[0] if isinstance(out, tuple) else out
        return heard

    hooks = [model.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    found = Cka()
    try:
        with evaluating([m for m in model.modules() if m.training]):
            for batch in batches:
                seen.clear()
                call(model, batch)
                if len(seen) < len(paths):
                    raise ConfigError(f"{who}: block {next(p for p in paths if p not in seen)} "
                                      "did not run on this batch")
                found.add([_rows(seen[p], inputs(batch)) for p in paths])
    finally:
        for hook in hooks:
            hook.remove()
    if not found.n:
        raise ConfigError(f"{who} reads batches of a support set, and there are none")
    return found.values()


def _rows(x: Tensor, given: Any) -> Tensor:
    mask = given.get("attention_mask") if isinstance(given, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def runs_of(blocks: int, alone: Iterable[int]) -> list[Run]:
    """First and last of the runs of blocks between those that stand alone."""
    found, first = list[Run](), 0
    for i in [*sorted(alone), blocks]:
        if i > first:
            found.append((first, i - 1))
        first = i + 1
    return found


def clustered(alike: Sequence[float], alone: Iterable[int], many: int) -> list[Run]:
    """All blocks as intervals, first and last: those `alone` by themselves, the others in `many`.

    From single blocks, the two neighbours whose blocks at the border (the last of the left one, the
    first of the right one) are most alike are joined, again and again; of equal ones the first.
    alike: of each block and the next.
    """
    alone = set(alone)
    found = [(i, i) for i in range(len(alike) + 1)]
    while len(found) > many + len(alone):
        free = [k for k in range(len(found) - 1)
                if not alone & {found[k][1], found[k + 1][0]}]
        k = max(free, key=lambda k: alike[found[k][1]])
        found[k:k + 2] = [(found[k][0], found[k + 1][1])]
    return found


def by_twos(blocks: int, alone: Iterable[int]) -> list[Run]:
    """The same, of two blocks each (one where a run is odd)."""
    alone = set(alone)
    pairs = [(i, min(i + 1, b)) for a, b in runs_of(blocks, alone) for i in range(a, b + 1, 2)]
    return sorted([*pairs, *((i, i) for i in alone)])


def spread(blocks: int, many: int) -> tuple[int, ...]:
    """So many of the blocks, evenly, the first and the last among them."""
    return tuple(round(i * (blocks - 1) / max(many - 1, 1)) for i in range(many))
