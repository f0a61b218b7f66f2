"""Which class of transformers holds the models of a task."""

from __future__ import annotations

from typing import Any

from .kinds import KINDS


def auto_of(task: str) -> Any:
    """The class that finds a task's models, told of those that it does not know by itself."""
    import transformers

    kind = KINDS[task]
    auto = getattr(transformers, kind.auto)
    for config, model in kind.also:
        if getattr(transformers, config) not in auto._model_mapping:
            auto.register(getattr(transformers, config), getattr(transformers, model),
                          exist_ok=True)
    return auto
