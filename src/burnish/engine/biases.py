"""Biases that a merge has made, in a folder that is read again.

An update that adds to the states folds into a bias, which a module gets where it had none. A folder
of transformers is built from its configuration: what that does not ask for is dropped when it is
read, without a word that an error would be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ..core.errors import CheckError


def agree(model: Any) -> Callable[[], None]:
    """Makes the configuration ask for the biases that a merged model has gained: flags of its own
    (``mlp_bias``, ``attention_bias``) are set, and the other biases they ask for are zeros. Answers
    with what takes that back.

    Raises CheckError where no flag asks for them, for the folder would be another model.
    """
    if (lost := gained(model)) is None or not lost:
        return lambda: None
    flags = [k for k, v in vars(model.config).items() if k.endswith("bias") and v is False]
    for count in range(1, min(len(flags), 3) + 1):
        for some in combinations(flags, count):
            asked = copy.deepcopy(model.config)
            for flag in some:
                setattr(asked, flag, True)
            names, has = _names(model, asked), set(model.state_dict())
            if names is None or not lost <= names or any(
                    not n.endswith(".bias") for n in names - has):
                continue
            made = [model.get_submodule(n.rpartition(".")[0]) for n in names - has]
            for module in made:
                like = module.weight
                rows = len(like) if isinstance(module, nn.Linear) else like.shape[-1]
                module._parameters["bias"] = nn.Parameter(like.new_zeros(rows), False)
            before, model.config = model.config, asked
            return partial(_back, model, before, made)
    first = min(lost)
    raise CheckError(f"merging gives {first.removesuffix('.bias')} a bias, and "
                     f"{type(model).__name__} is built without one, so a folder would lose it; "
                     "keep the adapter")


def _back(model: Any, config: Any, made: list[nn.Module]) -> None:
    model.config = config
    for module in made:
        module._parameters["bias"] = None


def gained(model: Any) -> set[str] | None:
    """Names of the model that its configuration does not ask for; None where that cannot be told.
    """
    names = _names(model, getattr(model, "config", None))
    return None if names is None else set(model.state_dict()) - names


def _names(model: Any, config: Any) -> set[str] | None:
    """What a model of this configuration holds, without any memory."""
    import transformers
    from transformers import initialization

    if not isinstance(model, transformers.PreTrainedModel):
        return None
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        return set(type(model)._from_config(copy.deepcopy(config)).state_dict())
