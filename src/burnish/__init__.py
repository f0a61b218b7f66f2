"""burnish: fine-tune any pre-trained PyTorch model within the memory you have.

    import burnish

    tuned = burnish.tune(model, "nf4 + snella(rank=8) + checkpoint")
    loss = tuned.step(batch)
    tuned.save("adapter/")

Everything here is imported when first used; ``import burnish`` itself only needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "tune": "engine.tune", "Tuned": "engine.tuned", "BlackBox": "engine.blackbox",
    "load": "formats.adapter",
    "open_model": "formats.opened",
    "shard": "engine.sharded", "repeat_blocks": "engine.repeat",
    "simulate": "memory", "measure": "memory", "plan": "memory", "MemoryReport": "memory",
    "fit": "fit", "TrainerCallback": "fit", "continual": "continual",
    "parse": "core.recipe", "Recipe": "core.recipe", "Method": "core.method",
    "setting": "core.method", "register": "core.registry",
    "export_peft": "formats.peft", "load_peft": "formats.peft",
    "push": "formats.sharing", "pull": "formats.sharing",
    **dict.fromkeys(("BurnishError", "ConfigError", "RecipeError", "TargetError", "DataError",
                     "FormatError", "NoPlanError", "CheckError", "MemoryExceeded"), "core.errors"),
}
_ALIAS = {"methods": ("core.registry", "catalogue")}

__all__ = sorted([*_HOME, *_ALIAS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _ALIAS:
        home, real = _ALIAS[name]
    elif name in _HOME:
        home, real = _HOME[name], name
    else:
        raise AttributeError(f"module 'burnish' has no attribute {name!r}")
    from .core.extras import worded

    with worded():
        value = getattr(importlib.import_module(f"burnish.{home}"), real)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from .continual.report import compare as continual
    from .core.errors import (
        BurnishError,
        CheckError,
        ConfigError,
        DataError,
        FormatError,
        MemoryExceeded,
        NoPlanError,
        RecipeError,
        TargetError,
    )
    from .core.method import Method, setting
    from .core.recipe import Recipe, parse
    from .core.registry import catalogue as methods
    from .core.registry import register
    from .engine.blackbox import BlackBox
    from .engine.repeat import repeat_blocks
    from .engine.sharded import shard
    from .engine.tune import tune
    from .engine.tuned import Tuned
    from .fit.bridge import TrainerCallback
    from .fit.run import fit
    from .formats.adapter import load
    from .formats.opened import open_model
    from .formats.peft import export_peft, load_peft
    from .formats.sharing import pull, push
    from .memory import MemoryReport, measure, plan, simulate
