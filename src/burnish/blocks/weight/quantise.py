"""Weights held in few bits: NF4 with double quantisation, bfloat16, and integer grids.

NF4 (QLoRA, 2023): the flattened weight is cut into blocks of 64; a block keeps a = max|w| and
each entry the index of the code nearest to w / a. Two indices share a byte, the even entry in
the high nibble. Double quantisation holds the a's themselves in 8 bits: their mean is taken off,
the rest is cut into blocks of 256 with one fp32 maximum and mapped to the signed 8-bit dynamic map.

    bits per weight = 4 + 32/64 = 4.5,   with double quantisation 4 + 8/64 + 32/(64 256) = 4.127

Sizes need not divide: the last block may be short. Encoding and decoding work in pieces of
`PIECE` entries, so the extra memory is about 2 MB whatever the weight; on CUDA decoding uses the
bitsandbytes kernel where that package is installed (same bytes, same values).
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ...core.errors import ConfigError
from ...core.followed import compiling, is_fake, simulated
from ..gpu.coded import Coded
from ..gpu.road import refusal
from ..update.codecs import dynamic_map
from .term import Provider

BLOCK, GROUP = 64, 256
#: entries handled at once; a multiple of BLOCK * GROUP
PIECE = 1 << 18

#: quantiles of the normal law at 8 + 7 levels and an exact zero, divided by the largest
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def midpoints(codes: Sequence[float]) -> list[float]:
    """Borders between neighbouring codes; what lies on a border goes to the lower code."""
    return [(a + b) / 2 for a, b in pairwise(codes)]


_BORDERS = midpoints(NF4)
_real: dict[tuple[str, torch.device], Tensor] = {}


def _values(name: str) -> list[float] | list[int] | Tensor:
    if name == "nf4_coarse":                    # upper 16 bits -> borders below all that have them
        high = torch.arange(1 << 16, dtype=torch.int32)
        least = torch.where(high < 1 << 15, high << 16, (high << 16) | 0xFFFF)
        return torch.bucketize(least.view(torch.float32), torch.tensor(_BORDERS)).to(torch.uint8)
    if name == "nf4_borders":
        return [*_BORDERS, float("inf")]
    dynamic = dynamic_map(8, signed=True)
    if name == "pairs":                         # byte -> the fp32 bits of both its values
        return [struct.unpack("q", struct.pack("2f", a, b))[0] for a in NF4 for b in NF4]
    return {"nf4": list(NF4), "dynamic": list(dynamic),
            "dynamic_borders": midpoints(dynamic)}[name]


def _table(name: str, like: Tensor) -> Tensor:
    """A constant on the device of `like`; one made under a fake mode is not kept."""
    mode = getattr(like, "fake_mode", None)
    home = _real if mode is None else mode.__dict__.setdefault("_burnish_constants", {})
    key = (name, like.device)
    if key not in home:
        if compiling():                          # a first run; a graph has the numbers in it then
            return torch.as_tensor(_values(name), device=like.device)
        with _disable_current_modes():           # no part of the step: nobody counts it
            made = torch.as_tensor(_values(name), device=like.device)
            home[key] = made if mode is None else mode.from_tensor(made)
    return home[key]


def _pieces(n: int, t: Tensor) -> range:
    """Starts of the pieces. In a simulation one piece says what every piece costs."""
    return range(0, min(n, PIECE) if simulated(t) else n, PIECE)


# -- NF4 ------------------------------------------------------------------------------------
@dataclass
class Nf4Tensor:
    """A weight of `shape` and `dtype` in NF4.

    codes: uint8, (ceil(n/2),). absmax: (ceil(n/64),), fp32, or uint8 when doubly quantised; then
    absmax_max: fp32, (ceil(n/64/256),), and offset: fp32, () are there, else None.
    """

    codes: Tensor
    absmax: Tensor
    absmax_max: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.absmax, self.absmax_max, self.offset)
                   if t is not None)

    @property
    def bits(self) -> float:
        """Bits per weight, everything counted."""
        return 8 * self.nbytes / max(1, self.shape.numel())

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """absmax of blocks start:stop in fp32."""
        a = self.absmax[start:stop]
        if self.offset is None or self.absmax_max is None:
            return a
        top = self.absmax_max[start // GROUP : -(-(start + len(a)) // GROUP)]
        top = top.repeat_interleave(GROUP)[start % GROUP :][: len(a)]
        return _table("dynamic", a).index_select(0, a.int()).mul_(top).add_(self.offset)

    def decode(self, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor of `dtype` (default: as encoded), into `out` if given."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.codes.device)
        if not out.is_contiguous() or out.shape != self.shape:
            raise ConfigError(f"decode: out must be contiguous and {tuple(self.shape)}, "
                              f"got {tuple(out.shape)}")
        if not refusal(out, self.codes):
            n = self.shape.numel()
            return self.coded(out.dtype).decode(out) if len(self.shape) == 2 else \
                self.coded(out.dtype, (1, n)).decode(out.view(1, n)).view(self.shape)
        if self.codes.is_cuda and not is_fake(self.codes) and out.dtype in _KERNEL_DTYPES:
            kernels = _bitsandbytes()
            if kernels is not None:
                return _decode_kernel(self, out, kernels)
        flat, n = out.view(-1), self.shape.numel()
        pairs = _table("pairs", self.codes)
        for i in _pieces(n, self.codes):
            self._decode_piece(i, flat[i : i + PIECE], pairs)
        return out

    def run(self, start: int, stop: int) -> Tensor:
        """Entries start:stop of the flattened weight, the same numbers as in the whole."""
        if start % (BLOCK * GROUP) == 0:             # its codes are a run too
            a, b = start // BLOCK, -(-stop // BLOCK)
            top = None if self.absmax_max is None else \
                self.absmax_max[a // GROUP : -(-b // GROUP)]
            return Nf4Tensor(self.codes[start // 2 : (stop + 1) // 2], self.absmax[a:b], top,
                             self.offset, torch.Size((stop - start,)), self.dtype).decode()
        first = start // BLOCK * BLOCK
        out = torch.empty(stop - first, dtype=self.dtype, device=self.codes.device)
        pairs = _table("pairs", self.codes)
        for i in _pieces(stop - first, self.codes):
            self._decode_piece(first + i, out[i : i + PIECE], pairs)
        return out[start - first :]

    def coded(self, dtype: torch.dtype, shape: tuple[int, int] | None = None) -> Coded:
        """As Triton's kernels take it, decoded to `dtype`."""
        return Coded(self.codes, shape or tuple(self.shape), dtype, self.absmax, self.absmax_max,
                     self.offset, _table("nf4", self.codes), _table("dynamic", self.codes))

    def _decode_piece(self, i: int, out: Tensor, pairs: Tensor) -> None:
        m = len(out)
        bytes_ = self.codes[i // 2 : (i + m + 1) // 2]
        w = pairs.index_select(0, bytes_.int()).view(torch.float32)
        a = self.scales(i // BLOCK, -(-(i + m) // BLOCK))
        whole = m // BLOCK * BLOCK
        w[:whole].view(-1, BLOCK).mul_(a[: whole // BLOCK, None])
        if whole < m:
            w[whole:m].mul_(a[-1])
        out.copy_(w[:m])


def nf4_encode(w: Tensor, double_quant: bool = True) -> Nf4Tensor:
    """`w` of any shape and float dtype as an :class:`Nf4Tensor` on the same device.

    Raises ConfigError for a weight that is not floating point or holds inf or nan.
    """
    if not w.is_floating_point():
        raise ConfigError(f"nf4 holds floating-point weights, not {w.dtype}")
    flat, n = w.detach().reshape(-1), w.numel()
    blocks = -(-n // BLOCK)
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=w.device)
    for i in _pieces(n, w):
        _encode_piece(flat[i : i + PIECE], codes[i // 2 :], absmax[i // BLOCK :])
    whole = absmax.isfinite().all()
    if not is_fake(absmax) and not whole:
        raise ConfigError("nf4: the weight holds inf or nan, which no code stands for")
    if not double_quant:
        return Nf4Tensor(codes, absmax, None, None, w.shape, w.dtype)
    return Nf4Tensor(codes, *_encode_absmax(absmax), w.shape, w.dtype)


def _encode_piece(x: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """Into the beginnings of `codes` and `absmax`. What it makes on the way is gone at its end, so
    no two pieces are in memory together."""
    m = len(x)
    x = x.float()
    if pad := -m % BLOCK:
        x = torch.nn.functional.pad(x, (0, pad))
    x = x.view(-1, BLOCK)
    a = x.abs().amax(1)
    absmax[: len(a)] = a
    x = x / a.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    # borders below it: at most one lies among the numbers that share their upper 16 bits, so a
    # look-up and one comparison tell (a quarter of the time of a comparison with each)
    index = _table("nf4_coarse", x).index_select(0, _upper(x.view(-1)))
    index += x.view(-1) > _table("nf4_borders", x).index_select(0, index.int())
    index = index.view(-1, 2)
    packed = index[:, 0].bitwise_left_shift_(4).bitwise_or_(index[:, 1])
    codes[: (m + 1) // 2] = packed[: (m + 1) // 2]


def _upper(x: Tensor) -> Tensor:
    return (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF)


def _encode_absmax(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 (blocks,) -> uint8 codes (blocks,), fp32 maxima (groups,), fp32 mean ()."""
    offset = a.double().mean().float()           # the same bits on every device
    rest = torch.nn.functional.pad(a - offset, (0, -len(a) % GROUP)).view(-1, GROUP)
    top = rest.abs().amax(1)
    rest = rest / top.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    index = torch.bucketize(rest.flatten(), _table("dynamic_borders", a), out_int32=True)
    return index[: len(a)].to(torch.uint8), top, offset


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def _bitsandbytes() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes.functional

    return bitsandbytes.functional


def _decode_kernel(q: Nf4Tensor, out: Tensor, kernels: Any) -> Tensor:
    state = kernels.QuantState(
        absmax=q.scales(), shape=q.shape, code=_table("nf4", q.codes), blocksize=BLOCK,
        quant_type="nf4", dtype=out.dtype)
    return kernels.dequantize_4bit(q.codes.view(-1, 1), state, out=out)


# -- providers ------------------------------------------------------------------------------
class Held(Provider):
    """Keeps the dtype of what it holds through ``module.to(dtype)``, which changes the one that it
    decodes to."""

    dtype: torch.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        like = next(b for b in self._buffers.values() if b is not None)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=like.device)).dtype
        kept = {n: b for n, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Nf4Provider(Held):
    """Holds a weight in NF4 and decodes it, a temporary, each time it is asked."""

    def __init__(self, weight: Tensor, double_quant: bool = True):
        super().__init__()
        q = nf4_encode(weight, double_quant)
        self.shape, self.dtype = q.shape, q.dtype
        for name in ("codes", "absmax", "absmax_max", "offset"):
            self.register_buffer(name, getattr(q, name))

    def held(self) -> Nf4Tensor:
        return Nf4Tensor(self.codes, self.absmax, self.absmax_max, self.offset,
                         self.shape, self.dtype)

    def weight(self) -> Tensor:
        return self.held().decode()

    def matrix(self, expert: int) -> Tensor:
        n = self.shape[1:].numel()
        return self.held().run(expert * n, expert * n + n).view(self.shape[1:])

    def road(self) -> str:
        return refusal(torch.empty(0, dtype=self.dtype, device=self.codes.device), self.codes)

    def coded(self, like: Tensor) -> Coded | None:
        if len(self.shape) != 2 or refusal(like, self.codes):
            return None
        return self.held().coded(self.dtype)

    def extra_repr(self) -> str:
        return f"nf4, {tuple(self.shape)}, {self.held().bits:.3f} bits per weight"


class Bf16Provider(Held):
    """Holds a weight in bfloat16; what it returns has the dtype the module stored."""

    def __init__(self, weight: Tensor):
        super().__init__()
        if not weight.is_floating_point():
            raise ConfigError(f"bf16 holds floating-point weights, not {weight.dtype}")
        self.dtype = weight.dtype
        self.register_buffer("held", weight.detach().to(torch.bfloat16))

    def weight(self) -> Tensor:
        return self.held.to(self.dtype)

    def matrix(self, expert: int) -> Tensor:
        return self.held[expert].to(self.dtype)

    def road(self) -> str | None:
        like = torch.empty(0, dtype=self.dtype, device=self.held.device)
        return refusal(like, self.held) if self.dtype != self.held.dtype else None

    def coded(self, like: Tensor) -> Coded | None:
        # in the tokens' precision it is a weight like any other
        if self.held.dim() != 2 or like.dtype == self.held.dtype or refusal(like, self.held):
            return None
        return Coded(self.held, tuple(self.held.shape), self.dtype)

    def extra_repr(self) -> str:
        return f"bf16, {tuple(self.held.shape)}"


# -- integer grids --------------------------------------------------------------------------
@dataclass(frozen=True)
class Quantiser:
    """An integer grid: w ~ scale (q - zero), one scale (and zero) per group.

    bits: 2..8. symmetric: q in [-Q, Q], Q = 2^(bits-1) - 1, zero = 0; else q in [0, 2^bits - 1].
    group: entries of the last dimension that share a scale; 0 for a whole row, -1 for the tensor.
    rule: "absmax" spans the group; "search" also tries clipping it to 50..100 % and keeps what
    has the least squared error per group.
    rounding: "nearest" (halves to even) or "stochastic" (unbiased).
    """

    bits: int = 4
    group: int = 0
    symmetric: bool = True
    rule: Literal["absmax", "search"] = "absmax"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"an integer grid has 2 to 8 bits, not {self.bits}")

    @property
    def limits(self) -> tuple[int, int]:
        top = 2 ** (self.bits - 1) - 1
        return (-top, top) if self.symmetric else (0, 2**self.bits - 1)

    def encode(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(q int8/uint8 of w's shape, scale fp32 (..., groups), zero int32 or None)."""
        x = self._grouped(w.detach().float())
        best: tuple[Tensor, Tensor | None] | None = None
        loss = None
        for keep in ([1.0] if self.rule == "absmax" else [1 - k / 40 for k in range(21)]):
            scale, zero = self._fit(x, keep)
            if self.rule == "absmax":
                best = scale, zero
                break
            error = (self._value(self._code(x, scale, zero), scale, zero) - x).square().sum(-1)
            if best is None or loss is None:
                best, loss = (scale, zero), error
            else:
                win = error < loss
                loss = torch.where(win, error, loss)
                best = (torch.where(win, scale, best[0]),
                        None if zero is None else torch.where(win, zero, best[1]))
        scale, zero = best
        q = self._code(x, scale, zero)
        q = q.to(torch.int8 if self.symmetric else torch.uint8)
        return self._flat(q, w.shape), scale, zero

    def decode(self, q: Tensor, scale: Tensor, zero: Tensor | None,
               dtype: torch.dtype = torch.float32) -> Tensor:
        """scale (q - zero), of q's shape."""
        return self._flat(self._value(self._grouped(q.float()), scale, zero), q.shape).to(dtype)

    def _grouped(self, w: Tensor) -> Tensor:
        """(..., groups, group); a short last group is padded with zeros."""
        if self.group < 0:
            return w.reshape(1, -1)
        size = self.group or w.shape[-1]
        w = torch.nn.functional.pad(w, (0, -w.shape[-1] % size))
        return w.unflatten(-1, (-1, size))

    def _flat(self, x: Tensor, shape: torch.Size) -> Tensor:
        if self.group < 0:
            return x.reshape(shape)
        return x.flatten(-2)[..., : shape[-1]].contiguous()

    def _fit(self, x: Tensor, keep: float) -> tuple[Tensor, Tensor | None]:
        lo, hi = self.limits
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            return (x.abs().amax(-1) * keep / hi).clamp_min(tiny), None
        low, high = x.amin(-1).clamp_max(0) * keep, x.amax(-1).clamp_min(0) * keep
        scale = ((high - low) / hi).clamp_min(tiny)
        return scale, (-low / scale).round().clamp(lo, hi).to(torch.int32)

    def _code(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        y = x / scale[..., None]
        y = (y + torch.rand_like(y)).floor_() if self.rounding == "stochastic" else y.round_()
        return (y if zero is None else y.add_(zero[..., None])).clamp_(*self.limits)

    @staticmethod
    def _value(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return (q if zero is None else q - zero[..., None]) * scale[..., None]
