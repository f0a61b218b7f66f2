"""What methods share that train all that stands outside the repeated blocks, and a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ...blocks.update.live import LiveBlocks, OnLeave, Policy, TrainableSchedule
from ...core.errors import RecipeError
from ...core.method import Method
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


def _own(model: nn.Module, **kw: bool) -> Iterator[tuple[str, nn.Parameter]]:
    for name, p in model.named_parameters(**kw):
        if p.is_floating_point() and ".burnish." not in f".{name}":
            yield name, p


def everything(part: Method, layers: int, anatomy: Anatomy) -> Iterator[Selection]:
    """All of the model may come to train; RecipeError where it has fewer blocks than `layers`."""
    if not 0 <= layers <= len(anatomy.blocks):
        raise RecipeError(f"{part.name}: layers={layers}, but this model has "
                          f"{len(anatomy.blocks)} repeated blocks to draw from")
    for name, _ in _own(anatomy.model):
        yield Selection(name)


def drawn(tuned: Tuned, draw: Callable[[Sequence[str]], Policy], on_leave: OnLeave) -> LiveBlocks:
    """The blocks whose paths the policy names live, and all else always; what a block shares with
    the outside is of the outside."""
    paths = [b.path for b in tuned.anatomy.blocks]
    named = list(_own(tuned.model, remove_duplicate=False))
    outside = {id(p) for n, p in named if not any(n.startswith(f"{b}.") for b in paths)}
    groups = {b: [p for n, p in named if n.startswith(f"{b}.") and id(p) not in outside]
              for b in paths}
    return LiveBlocks(TrainableSchedule(groups, draw(paths), state_on_leave=on_leave,
                                        optimizer=lambda: tuned.current_optimizer))
