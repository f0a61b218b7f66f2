"""Tasks that come one after the other: ``burnish.continual("digits", ["lora(rank=8)"])``.

The package itself is the function (:func:`burnish.continual.report.compare`), so that
``burnish.continual(...)`` and ``burnish.continual.streams`` both mean what they say. Nothing heavy
is imported before it is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness import Result, evaluate, run, search
    from .learner import Learner
    from .report import Report, compare
    from .streams import Stream, Task, by_class, by_domain
    from .training import Training

_HOME = {"Learner": "learner", "Report": "report", "Result": "harness", "Stream": "streams",
         "Task": "streams", "Training": "training", "by_class": "streams", "by_domain": "streams",
         "compare": "report", "evaluate": "harness", "run": "harness", "search": "harness"}

__all__ = ["Learner", "Report", "Result", "Stream", "Task", "Training", "by_class", "by_domain",
           "compare", "evaluate", "run", "search"]


class _Continual(ModuleType):
    """This module, callable."""

    def __call__(self, stream: Any, recipes: Any, **how: Any) -> Report:
        """Learn a stream of tasks with each recipe, beside what it is held against; see
        :func:`burnish.continual.report.compare`."""
        from .report import compare

        return compare(stream, recipes, **how)

    @property
    def continual(self) -> _Continual:
        return self

    def __getattr__(self, name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Continual
