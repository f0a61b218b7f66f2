"""The blocks of a model in place of which others stand, fewer or more of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def deepened(model: nn.Module, stack: str, made: nn.ModuleList, which: Sequence[int]
             ) -> Callable[[], None]:
    """Let the blocks of the list `stack` be those `made`, of which the i-th stands where
    ``which[i]`` did; what takes it back.

    The number and kinds of blocks in ``model.config`` follow, and so do the places in a key-value
    cache of what is made.
    """
    parent, _, name = stack.rpartition(".")
    modules: dict[str, Any] = model.get_submodule(parent)._modules
    found = modules[name]
    for k, block in enumerate(made):
        for m in block.modules():
            if isinstance(vars(m).get("layer_idx"), int):        # its place in a cache
                vars(m)["layer_idx"] = k
    modules[name] = made
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    was: dict[str, Any] = {}
    if isinstance(getattr(config, "num_hidden_layers", None), int):
        was["num_hidden_layers"], config.num_hidden_layers = config.num_hidden_layers, len(made)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == len(found):
        was["layer_types"] = kinds
        config.layer_types = [kinds[i] for i in which]

    def back() -> None:
        modules[name] = found
        for key, value in was.items():
            setattr(config, key, value)

    return back
