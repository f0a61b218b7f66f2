"""The checks of the conformance suite, by what they look at; conformance.py is their face."""

from __future__ import annotations

from . import attaching, cost, reference, settings, training, weights
from .common import Skip

__all__ = ["CHECKS", "ONCE", "Skip"]

#: in every cell of methods x models
CHECKS = (*attaching.CHECKS, *reference.CHECKS, *training.CHECKS, *weights.CHECKS, *cost.CHECKS)
#: once per method: they choose their models themselves, or no model changes the answer
ONCE = (*reference.ONCE, *settings.ONCE)
