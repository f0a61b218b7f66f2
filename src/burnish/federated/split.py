"""Whose rows are whose: a data set divided among clients."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import ConfigError


def number(*words: Any) -> int:
    """A seed made of words: the same everywhere, another for other words (31 bits)."""
    text = "\0".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def dirichlet(labels: Sequence[int], clients: int, alpha: float = 0.1, seed: int = 0,
              least: int = 1) -> list[list[int]]:
    """Row numbers of each client: of every class, shares drawn from Dirichlet(alpha, ..., alpha).

    Small alpha: a client has few classes; large: each has what all have. A client that would get
    fewer than `least` rows takes them from those that have most. Every row is somebody's, once.

    Raises ConfigError where there are fewer rows than ``clients * least``.
    """
    _check(len(labels), clients, least, seed)
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"alpha={alpha}: expected a number above 0 (small: clients with few "
                          "classes; large: all alike)")
    draw = np.random.default_rng(seed)
    found = np.asarray(labels)
    held: list[list[int]] = [[] for _ in range(clients)]
    for kind in np.unique(found):
        rows = draw.permutation(np.flatnonzero(found == kind))
        ends = np.floor(np.cumsum(draw.dirichlet([alpha] * clients)) * len(rows) + 0.5).astype(int)
        ends[-1] = len(rows)
        for mine, part in zip(held, np.split(rows, ends[:-1]), strict=True):
            mine += part.tolist()
    return _filled(held, least)


def even(rows: int, clients: int, seed: int = 0, least: int = 1) -> list[list[int]]:
    """Row numbers of each client, shuffled and dealt out: sizes differ by one at most."""
    _check(rows, clients, least, seed)
    order = np.random.default_rng(seed).permutation(rows)
    return [sorted(part.tolist()) for part in np.array_split(order, clients)]


def _check(rows: int, clients: int, least: int, seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"seed={seed}: expected 0 or more")
    if clients < 1 or least < 1:
        raise ConfigError(f"clients={clients}, least={least}: expected at least 1 of each")
    if rows < clients * least:
        raise ConfigError(f"{rows} rows are not enough for {clients} clients of at least {least}; "
                          f"take {rows // least} clients or fewer")


def _filled(held: list[list[int]], least: int) -> list[list[int]]:
    for poor in held:
        while len(poor) < least:
            poor.append(max(held, key=len).pop())
    return [sorted(mine) for mine in held]
