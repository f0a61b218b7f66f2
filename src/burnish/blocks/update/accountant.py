"""What noise on sums of Poisson-drawn samples has told of a single one: (epsilon, delta).

By the accountants of Google's dp-accounting: ``pld`` composes the distribution of the privacy loss
numerically, ``rdp`` bounds its moments. Both are upper bounds; a central-limit figure is none, and
neither is ``edgeworth``, a normal law with corrections: it is told, and never plans noise.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError


def _library() -> Any:
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError("epsilon is computed by dp-accounting, which is not installed: pip "
                          "install burnish[privacy], or give the noise itself, sigma=")
    import dp_accounting

    return dp_accounting


#: points of the grids of privacy losses that are composed: of one update, and of all
ONE, ALL = 500_000, 4_000_000
#: from one point of such a grid to the next
STEP = 1e-4


@lru_cache(maxsize=32)
def epsilon_of(sigma: float, rate: float, steps: int, delta: float, accountant: str) -> float:
    """Spent after so many updates with noise `sigma` times the largest norm of a sample.

    Where `pld` would take grids that are too large (so little noise, or so many updates, that
    epsilon is in the tens or hundreds), it is the bound of moments.
    """
    if not steps:
        return 0.0
    if accountant == "edgeworth":
        return edgeworth(sigma, rate, steps, delta)
    return _bound(sigma, rate, steps, delta, accountant)


def _bound(sigma: float, rate: float, steps: int, delta: float, accountant: str) -> float:
    library = _library()                             # says what is not installed
    noise: Any = library.GaussianDpEvent(sigma)
    if rate < 1:
        noise = library.PoissonSampledDpEvent(rate, noise)
    event = library.SelfComposedDpEvent(noise, steps)
    if accountant == "pld" and _composable(sigma, rate, steps):
        from dp_accounting.pld import PLDAccountant

        found = PLDAccountant(value_discretization_interval=STEP).compose(event).get_epsilon(delta)
        if math.isfinite(found):                     # not so of a delta below what it truncates
            return float(found)
    from dp_accounting.rdp import RdpAccountant

    return float(RdpAccountant().compose(event).get_epsilon(delta))


def _composable(sigma: float, rate: float, steps: int) -> bool:
    """Do the losses fit grids that are composed in seconds? Those of one update span its tails,
    10 deviations of the noise; those of all, by Chernoff, as many of their own sum."""
    if rate == 1:                                    # of Gaussians one is made
        sigma, steps = sigma / math.sqrt(steps), 1
    span = 20 / sigma if rate == 1 else 10 / sigma + 1 / (2 * sigma**2)
    if span > ONE * STEP:
        return False
    p, _, loss = _losses(sigma, rate)
    return 17 * math.sqrt(steps * _cumulants(p, loss)[1]) + 4 * span < ALL * STEP


@dataclass
class _Spent:
    """As dp-accounting's search asks an accountant: of events that are numbers, the noise."""

    rate: float
    steps: int
    accountant: str
    sigma: float = 0.0

    @property
    def ledger(self) -> Any:
        return _library().NoOpDpEvent()

    def compose(self, sigma: float) -> _Spent:
        self.sigma = sigma
        return self

    def get_epsilon(self, delta: float) -> float:
        return _bound(self.sigma, self.rate, self.steps, delta, self.accountant) if self.sigma \
            else math.inf


@lru_cache(maxsize=32)
def sigma_for(epsilon: float, rate: float, steps: int, delta: float, accountant: str) -> float:
    """The least noise with which so many updates spend no more than (epsilon, delta)."""
    if accountant == "edgeworth":
        raise ConfigError("edgeworth is an approximation and no bound, so it closes no budget: "
                          "plan noise with pld or rdp, or give sigma=")
    search = _library().mechanism_calibration
    try:
        return float(search.calibrate_dp_mechanism(
            lambda: _Spent(rate, steps, accountant), lambda sigma: sigma, epsilon, delta))
    except search.NoBracketIntervalFoundError:
        raise ConfigError(f"epsilon={epsilon:g} and delta={delta:g} are less than any noise up to "
                          f"2^30 times the largest norm spends, as {accountant} bounds it: give "
                          "more of one of them") from None


# -- a normal law with corrections --------------------------------------------------------------
def edgeworth(sigma: float, rate: float, steps: int, delta: float) -> float:
    """EW-TUNE's accountant: epsilon of a sum of `steps` privacy losses, whose law is approximated.

        L = log(p / q), q = N(0, sigma^2), p = (1 - rate) q + rate N(1, sigma^2)
        P(sum L > e) = 1 - Phi(z) + phi(z) (g He_2(z) / 6 + h He_3(z) / 24 + g^2 He_5(z) / 72)
        delta(e) = P_p(sum L > e) - exp(e) P_q(sum L > e), and the same with p and q exchanged

    z standardises e, g and h are skewness and excess kurtosis of the sum. O(1) in steps. Exact at
    rate 1; otherwise off both ways, most where a tail is far out. It is no bound. Beyond an epsilon
    of 700 it is the moments' bound.

    (Privately Fine-Tuning Large Language Models with Differential Privacy, 2022, arXiv:2210.15042;
    the error term of the paper is not taken along.)
    """
    p, q, loss = _losses(sigma, rate)
    ways = [(_cumulants(p, loss), _cumulants(q, loss)),
            (_cumulants(q, -loss), _cumulants(p, -loss))]

    if not all(of[1] > 0 for pair in ways for of in pair):        # no law that a grid holds
        return _bound(sigma, rate, steps, delta, "rdp")

    def above(e: float) -> bool:
        return max(_tail(e, one, steps) - math.exp(e) * _tail(e, two, steps)
                   for one, two in ways) > delta

    low, high = 0.0, 700.0
    if above(high):
        return _bound(sigma, rate, steps, delta, "rdp")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return high


def _losses(sigma: float, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """On a grid of what an update shows: the weights of p and of q, and log(p / q)."""
    x = torch.linspace(-14 * sigma - 1, 14 * sigma + 2, 200_001, dtype=torch.float64)
    none = -(x / sigma).square() / 2
    with_one = math.log(rate) + (2 * x - 1) / (2 * sigma**2)
    loss = with_one if rate == 1 else torch.logaddexp(
        torch.full_like(x, math.log1p(-rate)), with_one)
    p, q = (none + loss).softmax(0), none.softmax(0)
    return p, q, loss


def _cumulants(weight: Tensor, values: Tensor) -> tuple[float, float, float, float]:
    mean = (weight * values).sum()
    off = values - mean
    two, three, four = ((weight * off**k).sum() for k in (2, 3, 4))
    return float(mean), float(two), float(three), float(four - 3 * two**2)


def _tail(e: float, cumulants: tuple[float, float, float, float], steps: int) -> float:
    mean, two, three, four = cumulants
    z = (e - steps * mean) / math.sqrt(steps * two)
    if abs(z) > 35:
        return float(z < 0)
    g, h = three / (two**1.5 * math.sqrt(steps)), four / (two**2 * steps)
    he2, he3, he5 = z * z - 1, z**3 - 3 * z, z**5 - 10 * z**3 + 15 * z
    phi = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return math.erfc(z / math.sqrt(2)) / 2 + phi * (g / 6 * he2 + h / 24 * he3 + g * g / 72 * he5)
