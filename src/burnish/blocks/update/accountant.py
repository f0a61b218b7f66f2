"""What noise on sums of Poisson-drawn samples has told of a single one: (epsilon, delta).

By the accountants of Google's dp-accounting: ``pld`` composes the distribution of the privacy loss
numerically, ``rdp`` bounds its moments. Both are upper bounds; a central-limit figure is none.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

from ...core.errors import ConfigError


def _library() -> Any:
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError("epsilon is computed by dp-accounting, which is not installed: pip "
                          "install burnish[privacy], or give the noise itself, sigma=")
    import dp_accounting

    return dp_accounting


def _made(accountant: str) -> Any:
    if accountant == "rdp":
        from dp_accounting.rdp import RdpAccountant

        return RdpAccountant()
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant()


def _event(sigma: float, rate: float, steps: int) -> Any:
    library = _library()
    noise: Any = library.GaussianDpEvent(sigma)
    if rate < 1:
        noise = library.PoissonSampledDpEvent(rate, noise)
    return library.SelfComposedDpEvent(noise, steps)


@lru_cache(maxsize=32)
def epsilon_of(sigma: float, rate: float, steps: int, delta: float, accountant: str) -> float:
    """Spent after so many updates with noise `sigma` times the largest norm of a sample."""
    if not steps:
        return 0.0
    event = _event(sigma, rate, steps)               # says what is not installed
    try:
        return float(_made(accountant).compose(event).get_epsilon(delta))
    except (ValueError, MemoryError, OverflowError):
        if accountant == "rdp":
            raise
        # so little noise that no grid holds the losses; a bound of moments is one as well
        return float(_made("rdp").compose(event).get_epsilon(delta))


@lru_cache(maxsize=32)
def sigma_for(epsilon: float, rate: float, steps: int, delta: float, accountant: str) -> float:
    """The least noise with which so many updates spend no more than (epsilon, delta)."""
    library = _library()
    return float(library.calibrate_dp_mechanism(
        lambda: _made(accountant), lambda sigma: _event(sigma, rate, steps), epsilon, delta))
