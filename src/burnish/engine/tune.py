"""Joining a first recipe to a model: :func:`tune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..core.errors import CheckError, ConfigError
from ..core.method import Method
from ..core.processes import is_sharded
from ..core.recipe import Recipe, parse
from .check import check
from .swap import ATTR
from .tuned import DEFAULT, Tuned
from .undo import Transaction, whole


def tune(model: nn.Module, recipe: str | Method | Iterable[str | Method], *, targets: Any = None,
         head: bool | str = "auto", calibration: Any = None, example: Any = None,
         seed: int = 0, name: str = DEFAULT, settled: Mapping[str, Any] | None = None) -> Tuned:
    """Join a recipe to a model, in place, and return the :class:`Tuned` handle.

    model: any ``torch.nn.Module``.
    recipe: an expression (``"nf4 + snella(rank=8) + checkpoint"``), a method or a list of them.
    targets: what the parts apply to that can be narrowed, text or a list; by default deltas and
        storage take every linear outside the head. Refused when no part uses them.
    head: "auto" trains a classification-like head and leaves that of a language model or of a
        denoiser frozen.
    calibration: iterable of batches for methods that read data first.
    settled: what such methods decided once (:func:`burnish.load` knows it from the file).
    example: one batch; a traced step on fake tensors then proves, before anything runs, that
    every attached tensor is reached by forward and by gradient.
    seed: of everything that is drawn at the start.
    name: of this adapter, for :meth:`Tuned.use`.

    Raises RecipeError, TargetError, ConfigError (nothing is changed), CheckError (self-check).
    """
    parsed = parse(recipe)

    def change(undo: Transaction) -> Tuned:
        tuned = join(model, parsed, undo, targets=targets, head=head, calibration=calibration,
                     seed=seed, name=name, settled=settled)
        if next(tuned.parameters(), None) is None:
            raise CheckError(f"nothing trains with {parsed}: add a part that trains something, "
                             f"e.g. full + {parsed} or lora(rank=8) + {parsed}")
        tuned.steps.say_projected()
        if example is not None:
            check(tuned, example)
        tuned.undo = None
        return tuned

    check_model(model)
    return whole(model, change)


def check_model(model: Any) -> None:
    """Refuse what no recipe can be joined to."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"tune expects a torch.nn.Module, not {type(model).__name__}")
    if ATTR in model._modules:
        raise ConfigError("this model is tuned already; use tuned.add(name, recipe) for another "
                          "adapter, or tuned.detach() first")
    if next(model.parameters(), None) is None:
        raise ConfigError(f"{type(model).__name__} has no parameters to tune")
    parted = next((n for n, p in model.named_parameters() if is_sharded(p)), None)
    if parted is not None:
        raise ConfigError(f"{parted} is sharded already (a tensor-parallel plan, or FSDP2), and a "
                          "recipe is joined to whole weights: load the model without tp_plan, "
                          "tune it, and then call burnish.shard(tuned)")
    on_meta = next((n for n, p in model.named_parameters() if p.device.type == "meta"), None)
    if on_meta is not None:
        raise ConfigError(f"{on_meta} is on the meta device and has no values; load the weights "
                          "first (burnish.simulate takes models on meta)")


def join(model: nn.Module, recipe: Recipe, undo: Transaction, *, targets: Any = None,
         head: bool | str = False, calibration: Any = None, seed: int = 0,
         name: str = DEFAULT, settled: Mapping[str, Any] | None = None,
         filled: bool = False) -> Tuned:
    """A handle with its first adapter, as a part of the change `undo`.

    filled: the caller gives every tensor its value from a file and clears ``tuned.filled`` then.
    """
    tuned = Tuned(model, undo, calibration=calibration, filled=filled)
    tuned.add(name, recipe, targets=targets, head=head, seed=seed, settled=settled)
    return tuned
