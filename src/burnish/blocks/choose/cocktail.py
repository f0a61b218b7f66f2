"""Several data sets as one stream of rows, by shares, that goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...core.errors import ConfigError


def shares(sizes: Mapping[str, int], weights: Mapping[str, float] | None = None,
           temperature: float = 1.0) -> dict[str, float]:
    """How often each data set is drawn: by its weight, else in proportion to ``size^(1 / T)``."""
    if weights is not None and weights.keys() != sizes.keys():
        odd = min(weights.keys() ^ sizes.keys())
        raise ConfigError(f"a weight for each data set is expected ({', '.join(sizes)}), and "
                          f"{odd!r} is of one side alone")
    if temperature <= 0:
        raise ConfigError(f"a temperature above 0 is expected, not {temperature:g}")
    raw = {k: n ** (1 / temperature) for k, n in sizes.items()} if weights is None else \
        {k: float(weights[k]) for k in sizes}
    if min(raw.values()) < 0 or sum(raw.values()) <= 0:
        raise ConfigError("weights of at least 0 are expected, one of them above")
    return {k: w / sum(raw.values()) for k, w in raw.items()}


class Cocktail:
    """An endless stream of (name, number of the row), decided by the seed.

    share None: all data sets behind each other, shuffled anew for every pass, each row once in it.
    Else each draw takes a data set by its share, and of that the next row of a shuffled pass.
    """

    def __init__(self, sizes: Mapping[str, int], share: Mapping[str, float] | None, seed: int):
        if not sizes or min(sizes.values()) < 1:
            raise ConfigError("a cocktail is of data sets with a row or more each")
        self.sizes, self.share, self.seed = dict(sizes), share, seed
        self.names, self.drawn = list(sizes), 0
        self._of = dict.fromkeys(self.names, 0)          # rows drawn of each
        self._orders: dict[tuple[int, int], Sequence[int]] = {}

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return self

    def __next__(self) -> tuple[str, int]:
        k, self.drawn = self.drawn, self.drawn + 1
        if self.share is None:
            total = sum(self.sizes.values())
            at = self._order(-1, k // total, total)[k % total]
            for name, size in self.sizes.items():
                if at < size:
                    return name, at
                at -= size
        g = torch.Generator().manual_seed(_mixed(self.seed, len(self.names), k))
        share = self.share or {}
        i = int(torch.multinomial(torch.tensor([share[n] for n in self.names],
                                               dtype=torch.float64), 1, generator=g))
        name, n = self.names[i], self._of[self.names[i]]
        self._of[name], size = n + 1, self.sizes[self.names[i]]
        return name, self._order(i, n // size, size)[n % size]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"drawn": self.drawn, "of": dict(self._of), "sizes": dict(self.sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. ConfigError where the data sets are others."""
        if state["sizes"] != self.sizes:
            raise ConfigError(f"this stream was of {state['sizes']}, and these data sets have "
                              f"{self.sizes} rows")
        self.drawn, self._of = state["drawn"], dict(state["of"])

    def _order(self, which: int, turn: int, size: int) -> Sequence[int]:
        """Of one pass over a data set (-1: over all); those of earlier passes are let go."""
        if (which, turn) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != which}
            g = torch.Generator().manual_seed(_mixed(self.seed, which, turn))
            self._orders[which, turn] = torch.randperm(size, generator=g).tolist()
        return self._orders[which, turn]


def _mixed(seed: int, which: int, turn: int) -> int:
    """A seed of three numbers."""
    return (seed * 1_000_003 + (which + 1) * 8_191 + turn * 2_654_435_761) % (1 << 62)


def without(rows: Sequence[Any], held: Sequence[Any]) -> list[Any]:
    """The rows that are no held-out row."""
    known = {_key(r) for r in held}
    return [r for r in rows if _key(r) not in known]


def _key(row: Any) -> str:
    return json.dumps(row, sort_keys=True, default=repr)
