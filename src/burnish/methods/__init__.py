"""One file per published method: ``<axis>/<name>.py``, the file name is its name everywhere.

The package itself may be called, so that ``burnish.methods()`` is the catalogue however the name
was reached (:func:`burnish.core.registry.catalogue`).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Methods(ModuleType):
    """This module, callable."""

    def __call__(self) -> list[Any]:
        """Every method, by name, as entries with ``.name``, ``.axes``, ``.cls``, ``.summary``."""
        from ..core.registry import catalogue

        return catalogue()


sys.modules[__name__].__class__ = _Methods
