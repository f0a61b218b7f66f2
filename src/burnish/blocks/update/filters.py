"""A stop that holds whatever noise is chosen on the way: a filter of Renyi privacy.

    rdp(sigma) = log sum_k C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 sigma^2)) / (a - 1)
    spend sigma_1, sigma_2, ... while  sum_t rdp(sigma_t) <= B,
    B = epsilon - log(1 - 1/a) + log(delta a) / (a - 1)

a is a whole order, fixed beforehand; q the chance of a sample to be drawn. Each sigma_t may be
chosen by anything that was told before (fully adaptive composition: Individual Privacy Accounting
via a Renyi Filter, 2021, arXiv:2008.11193); an accountant of random sigma_t afterwards bounds
nothing. The moments are those of the sampled Gaussian (2019, arXiv:1908.10530).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...core.errors import ConfigError

#: orders among which a plan takes the one that serves it best
ORDERS = (*range(2, 64), *range(64, 513, 16))


@lru_cache(maxsize=4096)
def rdp(sigma: float, rate: float, order: int) -> float:
    """Of one update, at a whole order of 2 or more."""
    if rate == 1:
        return order / (2 * sigma**2)
    k = torch.arange(order + 1, dtype=torch.float64)
    a = torch.tensor(float(order), dtype=torch.float64)
    ways = torch.lgamma(a + 1) - torch.lgamma(k + 1) - torch.lgamma(a - k + 1)
    terms = ways + (a - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * sigma**2)
    return max(0.0, float(torch.logsumexp(terms, 0))) / (order - 1)


def allowed(epsilon: float, delta: float, order: int) -> float:
    """B: what may be spent at an order so that (epsilon, delta) holds."""
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def best(sigma: float, rate: float, steps: int, delta: float) -> tuple[float, int]:
    """(the least epsilon, its order) of so many updates with one noise."""
    spent = {a: steps * rdp(sigma, rate, a) - allowed(0.0, delta, a) for a in ORDERS}
    order = min(spent, key=lambda a: spent[a])
    return max(0.0, spent[order]), order


def planned(epsilon: float, rate: float, steps: int, delta: float) -> tuple[float, int]:
    """(the least noise with which so many updates spend no more, the order that shows it)."""
    low, high = 1e-2, 1e-2
    while best(high, rate, steps, delta)[0] > epsilon:
        low, high = high, 2 * high
        if high > 2**30:
            raise ConfigError(f"epsilon={epsilon:g} and delta={delta:g} are less than any noise up "
                              "to 2^30 times the largest norm spends: give more of one of them")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if best(middle, rate, steps, delta)[0] > epsilon \
            else (low, middle)
    return high, best(high, rate, steps, delta)[1]


@dataclass
class Filter:
    """What may be spent, and what has been; all at one order."""

    epsilon: float
    delta: float
    rate: float
    order: int
    spent: float = 0.0

    @property
    def budget(self) -> float:
        return allowed(self.epsilon, self.delta, self.order)

    def charge(self, sigma: float) -> None:
        """Spend one update. Raises ConfigError, and spends nothing, where that is too much."""
        after = self.spent + self.cost(sigma)
        if after > self.budget * (1 + 1e-9):
            raise ConfigError(f"an update with noise {sigma:.4g} would spend more than "
                              f"epsilon={self.epsilon:g}; the run ends here")
        self.spent = after

    def cost(self, sigma: float) -> float:
        """Of one update."""
        return rdp(sigma, self.rate, self.order)

    def told(self) -> float:
        """Epsilon of what has been spent."""
        return max(0.0, self.spent - allowed(0.0, self.delta, self.order)) if self.spent else 0.0

    def least(self, updates: int, left: int, most: float) -> float:
        """The least noise for so many `updates` after which `left` further ones are affordable
        with noise `most`; `most` where none is."""
        share = (self.budget - self.spent - left * self.cost(most)) / updates
        low, high = most, most
        while low > 1e-3 and self.cost(low) <= share:
            high, low = low, low / 2
        if high == low == most:                      # not even that
            return most
        for _ in range(40):
            middle = (low + high) / 2
            fits = self.cost(middle) <= share
            low, high = (low, middle) if fits else (middle, high)
        return high
