"""What our tests use and yours may: small models of real architectures with batches for them."""

from __future__ import annotations

from ..core.example import example_batch
from .models import NAMES, config, tiny
from .stir import stir

__all__ = ["NAMES", "config", "example_batch", "stir", "tiny"]
