"""From a model, data and a memory to a fine-tuned adapter: ``burnish.fit(model, data, ...)``.

The package itself is the function (:func:`burnish.fit.run.fit`), so that ``burnish.fit(...)`` and
``burnish.fit.data`` both mean what they say. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bridge import TrainerCallback
    from .run import Run

__all__ = ["Run", "TrainerCallback", "fit"]

_HOME = {"Run": "run", "TrainerCallback": "bridge"}


class _Fit(ModuleType):
    """This module, callable."""

    def __call__(self, model: Any, data: Any, recipe: Any = None, memory: Any = None,
                 output: Any = "out/", **training: Any) -> Run:
        """Fine-tune; see :func:`burnish.fit.run.fit`."""
        from .run import fit

        return fit(model, data, recipe=recipe, memory=memory, output=output, **training)

    @property
    def fit(self) -> _Fit:
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _HOME:
            import importlib

            return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Fit
