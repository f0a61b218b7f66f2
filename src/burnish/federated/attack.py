"""Can it be told which rows were trained on? The first attack: they have a smaller loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.state.taps import evaluating
from ..core.batches import call, moved
from ..core.errors import ConfigError
from .client import Loss, stacked


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The chance that a member's score is above another's (a tie counts half): 0.5 tells nothing,
    1 tells members apart."""
    if not len(members) or not len(others):
        raise ConfigError("an attack compares members with others, and one side is empty")
    one, two = (torch.as_tensor(s, dtype=torch.float64) for s in (members, others))
    if one.isnan().any() or two.isnan().any():
        raise ConfigError("an attack compares scores, and some are no numbers: does the model's "
                          "loss have a value on every row?")
    two = two.sort().values
    below = torch.searchsorted(two, one) + torch.searchsorted(two, one, right=True)
    return float(below.double().mean() / (2 * len(two)))


@torch.no_grad()
def membership(model: nn.Module, members: Sequence[Any], others: Sequence[Any],
               loss: Loss | None = None, collate: Callable[[list[Any]], Any] = stacked) -> float:
    """The AUC of an attack that takes rows of small loss for members (Yeom et al., 2018,
    arXiv:1709.01604). others: rows of the same law that were not trained on.

    A small figure is no guarantee, for there are stronger attacks; a large one is a leak.
    """
    device = next((p.device for p in model.parameters()), None)

    def score(row: Any) -> float:
        batch = moved(collate([row]), device)
        out = call(model, batch)
        value: Tensor = loss(out, batch) if loss is not None else getattr(out, "loss", out)
        return -float(value)

    with evaluating([m for m in model.modules() if m.training]):
        return auc([score(r) for r in members], [score(r) for r in others])
