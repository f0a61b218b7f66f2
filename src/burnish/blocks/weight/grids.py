"""Weights held on a grid with a scale for every few inputs: whole numbers of 2 to 8 bits, or FP8.

    q = clip(round(w / s) + z)          w' = s (q - z)               whole numbers
    q = fp8(w / s)                      w' = s q                     8-bit floating point

A matrix (out, in) is cut into runs of `group` inputs of one output; each has a scale in fp32 and,
where the grid need not lie around zero, a zero point of one byte. The last run of an output may be
short. Codes are packed without gaps: b bits are held as parts of 4, 2 and 1 (3 = 2 + 1), each part
of all entries beside the others. Encoding and decoding work through a few rows at a time, so the
memory beside is a few MB whatever the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.followed import is_fake, simulated
from ...core.site import Place
from ..tape.codes import packed, unpacked
from .quantise import PIECE, Held, Quantiser

#: 8-bit floating-point formats by the bits of exponent and mantissa
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def parts(bits: int) -> list[int]:
    """Powers of two that add up to a number of bits, largest first."""
    return [8] if bits == 8 else [p for p in (4, 2, 1) if bits & p]


class OnGrid(Held):
    """Holds a weight in codes and scales, a grid's own way, and decodes it when asked.

    weight: as the module stores it; place: which says what of it is out and in.
    """

    def __init__(self, weight: Tensor, place: Place, group: int):
        super().__init__()
        if not weight.is_floating_point():
            raise ConfigError(f"a grid holds floating-point weights, not {weight.dtype}")
        W = place.view(weight.detach())
        self.place, self.stored, self.dtype = place, weight.shape, weight.dtype
        self.lead, self.inp = W.shape[:-1], W.shape[-1]
        self.group = min(group, self.inp) or self.inp
        self.scale: Tensor
        self.register_buffer("scale", torch.empty(self.rows, -(-self.inp // self.group),
                                                  dtype=torch.float32, device=weight.device))
        self.room(weight.device)
        W = W.reshape(self.rows, self.inp)
        for a, b in self.runs():
            self.put(a, b, W[a:b])
        sound = self.scale.isfinite().all()
        if not is_fake(sound) and not sound:
            raise ConfigError("the weight holds inf or nan, which no grid spans")

    @property
    def rows(self) -> int:
        return self.lead.numel()

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Runs of rows that are worked on at once, from `start`, a multiple of 8, to `stop`. In
        a simulation the first says what each costs."""
        step = max(8, PIECE // self.inp // 8 * 8)          # whole bytes of every part
        stop = self.rows if stop is None else stop
        end = min(stop, start + step) if simulated(self.scale) else stop
        return ((a, min(stop, a + step)) for a in range(start, end, step))

    def room(self, device: torch.device) -> None:
        """Make the buffers of the codes."""
        raise NotImplementedError

    def put(self, a: int, b: int, w: Tensor) -> None:
        """Encode rows a:b."""
        raise NotImplementedError

    def get(self, a: int, b: int, wide: torch.dtype) -> Tensor:
        """Rows a:b in units of their scales, (b - a, groups, group), a fresh tensor."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        W = self.decoded(0, self.rows).view(*self.lead, self.inp)
        return self.place.unview(W, torch.empty(self.stored, device="meta"))

    def matrix(self, expert: int) -> Tensor:
        start, n = expert * self.lead[-1], self.lead[-1]
        first = start // 8 * 8                             # whole bytes of every part
        W = self.decoded(first, start + n)[start - first:]
        return self.place.unview(W, torch.empty(self.stored[1:], device="meta"))

    def decoded(self, start: int, stop: int) -> Tensor:
        """Rows start:stop, start a multiple of 8."""
        out = torch.empty(stop - start, self.inp, dtype=self.dtype, device=self.scale.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        for a, b in self.runs(start, stop):
            w = self.get(a, b, wide).mul_(self.scale[a:b].unsqueeze(-1))
            out[a - start:b - start] = w.flatten(1)[:, : self.inp]
        return out

    @property
    def bits(self) -> float:
        """Bits per weight, everything counted."""
        return 8 * self.nbytes / max(1, self.stored.numel())

    def extra_repr(self) -> str:
        return f"{tuple(self.stored)}, {self.bits:.3f} bits per weight"

    def grouped(self, q: Tensor) -> Tensor:
        """Rows as (rows, groups, group), the last group filled with zeros."""
        if self.inp % self.group:
            q = torch.nn.functional.pad(q, (0, -self.inp % self.group))
        return q.unflatten(-1, (-1, self.group))


class WholeProvider(OnGrid):
    """The same in whole numbers, by a :class:`~burnish.blocks.weight.quantise.Quantiser`."""

    def __init__(self, weight: Tensor, place: Place, quantiser: Quantiser):
        self.__dict__["quantiser"] = quantiser
        super().__init__(weight, place, quantiser.group)

    def room(self, device: torch.device) -> None:
        n = self.rows * self.inp
        for p in parts(self.quantiser.bits):
            self.register_buffer(f"codes{p}", torch.empty(-(-n * p // 8), dtype=torch.uint8,
                                                          device=device))
        self.zero: Tensor | None
        self.register_buffer("zero", None if self.quantiser.symmetric else
                             torch.empty_like(self.scale, dtype=torch.uint8))

    def put(self, a: int, b: int, w: Tensor) -> None:
        q, scale, zero = self.quantiser.encode(w)
        self.scale[a:b] = scale
        if zero is not None:
            self.zero[a:b] = zero
        q = q.to(torch.int16).sub_(self.quantiser.limits[0]).to(torch.uint8).flatten()
        below = 0
        for p in parts(self.quantiser.bits):
            made = packed((q >> below) & (2**p - 1), p)
            at = a * self.inp * p // 8
            self._buffers[f"codes{p}"][at : at + len(made)] = made
            below += p

    def get(self, a: int, b: int, wide: torch.dtype) -> Tensor:
        n, q, below = (b - a) * self.inp, None, 0
        for p in parts(self.quantiser.bits):
            at = a * self.inp * p // 8
            part = unpacked(self._buffers[f"codes{p}"][at : at + -(-n * p // 8)], p, n)
            q = part if q is None else q | (part << below)
            below += p
        w = self.grouped(q.view(b - a, self.inp)).to(wide)
        return w.add_(self.quantiser.limits[0]) if self.zero is None else \
            w.sub_(self.zero[a:b].unsqueeze(-1))


class Fp8Provider(OnGrid):
    """The same in 8-bit floating point, the largest entry of a run on the format's largest."""

    def __init__(self, weight: Tensor, place: Place, group: int, form: str):
        self.__dict__["form"] = FP8[form]
        super().__init__(weight, place, group)

    def room(self, device: torch.device) -> None:
        self.codes8: Tensor
        self.register_buffer("codes8", torch.empty(self.rows, self.inp, dtype=torch.uint8,
                                                   device=device))

    def put(self, a: int, b: int, w: Tensor) -> None:
        x, info = self.grouped(w.float()), torch.finfo(self.form)
        self.scale[a:b] = s = (x.abs().amax(-1) / info.max).clamp_min(
            torch.finfo(torch.float32).tiny)
        q = (x / s.unsqueeze(-1)).clamp_(-info.max, info.max).flatten(1)[:, : self.inp]
        self.codes8[a:b] = q.to(self.form).view(torch.uint8)

    def get(self, a: int, b: int, wide: torch.dtype) -> Tensor:
        return self.grouped(self.codes8[a:b].view(self.form).to(wide))
