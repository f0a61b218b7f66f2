"""Weights of which some entries are zero, and stay so.

What is held is the weight itself with zeros in it: it takes the room and the time that it took (no
machine gains from scattered zeros without kernels for them). An entry that is zero counts as
pruned, so the mask is in the values: nothing is held beside them, and a file that has to know it
gets one bit an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .term import Provider, Wrap


def packed(mask: Tensor) -> Tensor:
    """Eight truth values to a byte, the first in the lowest bit, (ceil(n / 8),)."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    out = torch.zeros(flat.numel() // 8, dtype=torch.uint8, device=flat.device)
    for k in range(8):
        out |= flat[k::8] << k
    return out


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The truth values again."""
    out = torch.empty(bits.numel(), 8, dtype=torch.bool, device=bits.device)
    for k in range(8):
        out[:, k] = (bits >> k) & 1
    return out.flatten()[: shape.numel()].view(shape)


class Pruned(Provider):
    """Holds a weight with zeros where `keep` (of its shape) is False; None: as it is."""

    def __init__(self, weight: Tensor, keep: Tensor | None = None):
        super().__init__()
        self.held: Tensor
        weight = weight.detach()
        self.register_buffer("held", weight.clone() if keep is None else
                             weight.masked_fill(~keep, 0))

    def weight(self) -> Tensor:
        return self.held

    def matrix(self, expert: int) -> Tensor:
        return self.held[expert]

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    def extra_repr(self) -> str:
        return f"pruned, {tuple(self.held.shape)}"


class Chosen(Pruned):
    """The same where data have told what stays: files hold the mask."""

    def get_extra_state(self) -> Tensor:
        return packed(self.held != 0)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: in a state dict of torch's the values come beside it."""

    def remade(self, weight: Tensor, state: Tensor) -> None:
        keep = unpacked(state.to(self.held.device), self.held.shape)
        self.held.copy_(weight.to(self.held).masked_fill(~keep, 0))


class Masked(Wrap):
    """``W' = V * M``, M one where the weight this began with is not zero.

    The mask is held in bits, one an entry. A base that gets another form since is looked at again.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.bits: Tensor
        self.shape = weight.shape
        self.register_buffer("bits", packed(weight.detach() != 0))

    def of(self, V: Tensor) -> Tensor:
        return V.masked_fill(~unpacked(self.bits, self.shape), 0)

    def restart(self, V: Tensor) -> None:
        self.bits.copy_(packed(V != 0))
