"""Units of a state that are switched off, and may come back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UnitMask(nn.Module):
    """``y = x * alive``, unit by unit: unit u owns the channels u width : (u + 1) width of x.

    alive (units,) bool, a buffer; all live at the start. Folds into the columns of the weight
    behind it exactly.
    """

    def __init__(self, units: int, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("alive", torch.ones(units, dtype=torch.bool))

    def channels(self) -> Tensor:
        """Per channel, bool."""
        return self.alive.repeat_interleave(self.width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channels().to(x.dtype)

    @torch.no_grad()
    def fold(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Zero the columns that read what is switched off."""
        weight = values.get("weight")
        weight = module.weight.detach() if weight is None else weight
        keep = self.channels().to(weight.dtype)
        stored_out_first = isinstance(module, nn.Linear)
        values["weight"] = weight * (keep if stored_out_first else keep.unsqueeze(1))
