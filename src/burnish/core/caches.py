"""Keys and values that language models keep for the next token, which no training step reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, no part of the model keeps keys and values or states by itself (its config's
    ``use_cache``); a call that asks for them gets them."""
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None
               and getattr(c, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
