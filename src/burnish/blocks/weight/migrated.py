"""Linears on whole numbers whose inputs have a scale per channel, which has moved into the weight.

    x^ = clip(round((x - z) / s))           static, z and s (in,) from data
    W^ = round_o(W diag(s))                 whole numbers, one scale per output
    y  = x^ W^T^ + W z + b

The product is one of whole numbers: within its sum there is no scale. Everything is computed in
real units, ``x' = s x^ + z`` and ``W' = W^ diag(1/s)``, so that what is added beside reads and adds
real numbers; ``y = x' W'^T + b + (W - W') z`` is the same number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.site import Place
from ..tape.functions import applied, transformed
from .grids import WholeProvider
from .pruned import packed, unpacked
from .quantise import Quantiser

#: smallest scale of a channel, as a share of the largest
LEAST = 2.0**-16


class PerToken(WholeProvider):
    """Whole numbers, one scale per output; what the layer reads is rounded on a grid around zero
    for each token: ``2^(bits-1) - 1`` steps to either side."""

    def __init__(self, weight: Tensor, place: Place, bits: int, input_bits: int):
        super().__init__(weight, place, Quantiser(bits, 0, symmetric=True))
        self.top = 2 ** (input_bits - 1) - 1

    @property
    def at_ends(self) -> bool:
        return True

    def given(self, x: Tensor) -> Tensor:
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        s = (wide.abs().amax(-1, keepdim=True) / self.top).clamp_min(torch.finfo(wide.dtype).tiny)
        return passed(x, (wide / s).round_().mul_(s).to(x.dtype))

    def gives(self, y: Tensor) -> Tensor:
        return y


class PerChannel(PerToken):
    """The same with a static grid for each channel of the input, whose scale the weight holds.

    ranges: (2, in), what calibration showed of each channel; None: they come from a file.
    centred: z in the middle of the range, else zero.
    """

    first: tuple[Tensor, Tensor]

    def __init__(self, weight: Tensor, place: Place, bits: int, input_bits: int,
                 ranges: Tensor | None, centred: bool):
        top = 2 ** (input_bits - 1) - 1
        shift = torch.zeros(place.inp, dtype=torch.float32, device=weight.device)
        step = torch.ones_like(shift)
        if ranges is not None:
            low, high = ranges.to(shift)
            shift = (low + high) / 2 if centred else shift
            step = torch.maximum(high - shift, shift - low) / top
            step = step.clamp_min(step.amax() * LEAST)
            step = torch.where(step > 0, step, torch.ones_like(step))
        self.__dict__["first"] = shift, step         # encoding asks for them
        super().__init__(weight, place, bits, input_bits)
        del self.__dict__["first"]
        self.settle(weight)

    def room(self, device: torch.device) -> None:
        super().room(device)
        self.shift: Tensor
        self.step: Tensor
        self.rest: Tensor
        for name, value in zip(("shift", "step"), self.first, strict=True):
            self.register_buffer(name, value)
        self.register_buffer("rest", torch.zeros(self.rows, dtype=torch.float32, device=device))

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """What the weight's own rounding would take of z: (W - W') z."""
        W, held = (self.place.view(w).to(self.shift.dtype) for w in (weight.detach(),
                                                                     self.weight()))
        self.rest.copy_((W - held) @ self.shift)

    def put(self, a: int, b: int, w: Tensor) -> None:
        super().put(a, b, w.to(self.step.dtype) * self.step)

    def get(self, a: int, b: int, wide: torch.dtype) -> Tensor:
        return super().get(a, b, wide).div_(self.step)

    def given(self, x: Tensor) -> Tensor:
        if transformed():
            made, inside = self._on_grid(x.detach())
            return made + (x - x.detach()) * inside
        out: Tensor = applied(_Given, x, self)
        return out

    def _on_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x on the grids, where it was not clipped)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        q = ((wide - self.shift) / self.step).round_()
        inside = q.abs() <= self.top
        return q.clamp_(-self.top, self.top).mul_(self.step).add_(self.shift).to(x.dtype), inside

    def gives(self, y: Tensor) -> Tensor:
        return y + self.rest.to(y.dtype)

    def get_extra_state(self) -> Tensor:
        return torch.stack([self.shift, self.step])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: in a state dict of torch's the values come beside it."""

    @torch.no_grad()
    def remade(self, weight: Tensor, state: Tensor) -> None:
        for there, value in zip((self.shift, self.step), state, strict=True):
            there.copy_(value)
        W = self.place.view(weight.detach().to(self.scale.device)).reshape(self.rows, self.inp)
        for a, b in self.runs():
            self.put(a, b, W[a:b])
        self.settle(weight.to(self.scale.device))


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: PerChannel) -> Tensor:
        made, inside = how._on_grid(x)
        ctx.save_for_backward(packed(inside) if ctx.needs_input_grad[0] else None)
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        return g.masked_fill(~unpacked(bits, g.shape), 0), None


def passed(x: Tensor, values: Tensor) -> Tensor:
    """The values, with the gradient of x."""
    if transformed():
        return values + (x - x.detach())
    out: Tensor = applied(_Passed, x, values)
    return out


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
