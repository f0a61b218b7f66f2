"""How the samples of an update are drawn: every one by itself, with the same chance (Poisson).

A guarantee about single samples counts on it: which samples stand beside one says nothing of it,
and a batch has any size, none among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """rows: samples there are.  batch: how many of them an update is expected to have."""

    rows: int
    batch: float

    def __post_init__(self) -> None:
        if not 0 < self.batch <= self.rows:
            raise ConfigError(f"an update cannot be expected to draw {self.batch:g} of {self.rows} "
                              "samples; take a batch above 0 and no larger than there are rows")

    @property
    def rate(self) -> float:
        """The chance of each sample to be in an update."""
        return self.batch / self.rows
