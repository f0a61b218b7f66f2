"""What our tests use and yours may: small models of real architectures with batches for them, and
a tuned model held against its equation."""

from __future__ import annotations

from ..core.example import example_batch
from .equation import follows
from .models import NAMES, config, tiny
from .stir import stir

__all__ = ["NAMES", "config", "example_batch", "follows", "stir", "tiny"]
