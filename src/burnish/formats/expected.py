"""What an adapter's recipe would make, compared with its file before any of it is made.

A recipe in a file may ask for a rank of a billion. Where a setting is large, the recipe is first
joined to a copy of the model that has shapes and no memory, and the tensors it makes there must be
those of the file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.errors import BurnishError, FormatError
from ..core.recipe import parse
from ..engine.tune import tune
from ..engine.tuned import Tuned

#: settings up to this size make nothing that is large beside the model itself
LARGE = 512


def check_sizes(model: nn.Module | Tuned, adapters: Mapping[str, Mapping[str, Any]],
                shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises FormatError when the adapters' recipes ask for more than the file holds.

    model: a base, or what they will stand on beside others.
    """
    largest = max((v for entry in adapters.values() for v in _settings(entry["recipe"])),
                  default=0)
    if largest <= LARGE:
        return
    held = max((n for s in shapes.values() for n in s), default=0)
    if largest > 1024 * max(held, LARGE):            # whatever the method: no tensor shows it
        raise FormatError(f"{where}: a setting of its recipe is {largest}, its largest tensor has "
                          f"{held} rows or columns; the recipe is not the file's")
    for name, entry in adapters.items():
        made = _made(model, entry)
        for path, shape in made.items():
            key = path.replace(f"burnish.{PROBE}.", f"burnish.{name}.")
            if key in shapes and shapes[key] != shape:
                raise FormatError(f"{where}: {key} has shape {shapes[key]}, its recipe makes "
                                  f"{shape}")


PROBE = "probe"


def _settings(recipe: Any) -> list[int]:
    """Whole numbers of the parts that may make tensors: what only decides what is kept for backward
    (a threshold in bytes) makes none."""
    return [v for m in parse(recipe) if not set(m.axes()) <= {"activations", "controller"}
            for v in m.settings().values() if isinstance(v, int) and not isinstance(v, bool)]


def _made(model: nn.Module | Tuned, entry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an adapter's own tensors, made without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ..memory.fakes import fake_copy, fakes_move

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes_move():
        said = {"targets": entry.get("targets"), "head": False, "settled": entry.get("settled")}
        memo: dict[int, Any] = {}
        if isinstance(model, Tuned):
            memo[id(model.current_optimizer)] = None
            fake_copy(model.model, mode, "cpu", memo=memo)
            tuned = copy.deepcopy(model, memo)
            tuned.undo = None
        else:
            twin = fake_copy(model, mode, "cpu")
        try:
            with mode:
                if isinstance(model, Tuned):
                    tuned.filled = True
                    tuned.add(PROBE, entry["recipe"], **said)
                else:
                    tuned = tune(twin, entry["recipe"], name=PROBE, **said)
                return {n: tuple(t.shape) for n, t in tuned.tensors(PROBE).items()
                        if f"burnish.{PROBE}." in n}
        except BurnishError:
            raise
        except Exception:                            # a start that reads values: sizes stay unknown
            return {}
