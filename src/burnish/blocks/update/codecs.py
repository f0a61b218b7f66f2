"""State codecs: in what form a moment is stored between steps.

A codec turns a flat fp32 tensor into a few small tensors and back, any slice of whole blocks at a
time, so a step never holds more of the decoded state than the slice it works on::

    parts = codec.empty(n, signed, device)         # codes of zero
    x = codec.read(parts, lo, hi)                  # fp32; a view of the state where it is fp32
    codec.write(parts, lo, hi, x)                  # back to codes

``Block8`` and ``Block4`` follow *8-bit Optimizers via Block-wise Quantization* (Dettmers et al.,
2021): values are divided by their block's largest magnitude and stored as the nearest entry of a
dynamic map, whose entries are a sign, a run of zeros that divides by ten each, and a linear
fraction in the remaining bits (:func:`dynamic_map`).

Codes are rounded stochastically. To the nearest entry, a value whose decay is smaller than half a
spacing never moves: a second moment (1 - b2 = 0.001, spacings of 1 to 30 %) would stand for ever
where gradients have stopped. Between its two neighbours, up with the probability of its place
between them, the mean is right at every step and no byte is added: over the elements of a tensor
the mean stays within 3 % of fp32 (8 bits; 10 % with 4), as long as it is well above the smallest
entry of the block: 3e-7 of its largest with 8 bits and 3e-3 with 4, where second moments stop.

    fp32    4            bytes per element          bf16    2
    Block8  1 + 4/256                               Block4  1/2 + 4/128
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...core.errors import RecipeError, nearest
from .noise import CounterNoise

Parts = dict[str, Tensor]


@lru_cache(maxsize=8)
def dynamic_map(bits: int, signed: bool) -> tuple[float, ...]:
    """The 2^bits sorted entries of the dynamic map, in [-1, 1] or [0, 1]; 0 and 1 are entries.

    With b bits of magnitude, a run of k zeros leaves f bits of fraction: 2^f equal parts of
    [0.1, 1], each stood for by its middle, times 10^-k. Signed, f = b - 1 - k over b = bits - 1
    (the sign takes one); unsigned, f = bits - 1 - k >= 1 (the last pattern is spent on 1).
    """
    values = [0.0, 1.0]
    for k in range(bits - 1):
        f = bits - 2 - k if signed else bits - 1 - k
        middles = [10.0**-k * (0.1 + 0.9 * (i + 0.5) / 2**f) for i in range(2**f)]
        values += middles + ([-v for v in middles] if signed else [])
    return tuple(sorted(values))


class Codec(Protocol):
    """See the module. `lo` and `hi` are multiples of `block` (`hi` may be the end)."""

    block: int
    view: ClassVar[bool]              # `read` is a view: changed in place, not written back

    def empty(self, n: int, signed: bool, device: torch.device) -> Parts: ...
    def read(self, parts: Parts, lo: int, hi: int) -> Tensor: ...
    def write(self, parts: Parts, lo: int, hi: int, x: Tensor,
              noise: CounterNoise | None = None, turn: int = 0) -> None: ...
    def bytes(self, n: int) -> int: ...


@dataclass(frozen=True)
class Plain:
    """The state as it is: fp32 (fp64 beside fp64 weights). `read` is a view."""

    view: ClassVar[bool] = True

    dtype: torch.dtype = torch.float32
    block: int = 1

    def empty(self, n: int, signed: bool, device: torch.device) -> Parts:
        return {"": torch.zeros(n, dtype=self.dtype, device=device)}

    def read(self, parts: Parts, lo: int, hi: int) -> Tensor:
        return parts[""].view(-1)[lo:hi]

    def write(self, parts: Parts, lo: int, hi: int, x: Tensor,
              noise: CounterNoise | None = None, turn: int = 0) -> None:
        parts[""].view(-1)[lo:hi].copy_(x)

    def bytes(self, n: int) -> int:
        return n * self.dtype.itemsize


@dataclass(frozen=True)
class Bf16:
    """bf16 state. Stochastic rounding by default: with nearest rounding a second moment whose
    decay is 0.999 never moves, because its changes are smaller than half a spacing."""

    view: ClassVar[bool] = False

    stochastic: bool = True
    block: int = 1

    def empty(self, n: int, signed: bool, device: torch.device) -> Parts:
        return {"": torch.zeros(n, dtype=torch.bfloat16, device=device)}

    def read(self, parts: Parts, lo: int, hi: int) -> Tensor:
        return parts[""].view(-1)[lo:hi].float()

    def write(self, parts: Parts, lo: int, hi: int, x: Tensor,
              noise: CounterNoise | None = None, turn: int = 0) -> None:
        if self.stochastic and noise is not None:
            x = stochastic_bf16(x, noise.bits16(hi - lo, lo, turn=turn, device=x.device))
        parts[""].view(-1)[lo:hi].copy_(x)

    def bytes(self, n: int) -> int:
        return 2 * n


@dataclass(frozen=True)
class Block:
    """Block-wise dynamic quantisation; the last block may be short.

    up_from_zero: an unsigned value that is not zero never gets the code of zero. A second moment
    flushed to zero would leave m / eps as the step.
    """

    view: ClassVar[bool] = False

    bits: int = 8
    block: int = 256
    up_from_zero: bool = True

    def empty(self, n: int, signed: bool, device: torch.device) -> Parts:
        codes = torch.full((n,), dynamic_map(self.bits, signed).index(0.0), dtype=torch.uint8,
                           device=device)
        name = "codes" if signed else "ucodes"
        return {name: self._pack(codes), "absmax": torch.zeros(-(-n // self.block), device=device)}

    def read(self, parts: Parts, lo: int, hi: int) -> Tensor:
        name, signed = self._name(parts)
        scale = parts["absmax"][lo // self.block : -(-hi // self.block)]
        codes = self._unpack(parts[name], lo, hi)
        x = _tables(self.bits, signed, scale).entries.index_select(0, codes.int())
        return x.mul_(scale.repeat_interleave(self.block, output_size=len(scale) * self.block)
                      [: hi - lo])

    def write(self, parts: Parts, lo: int, hi: int, x: Tensor,
              noise: CounterNoise | None = None, turn: int = 0) -> None:
        name, signed = self._name(parts)
        rows = F.pad(x.float(), (0, -(hi - lo) % self.block)).view(-1, self.block)
        scale = rows.abs().amax(1)
        parts["absmax"][lo // self.block : -(-hi // self.block)] = scale
        rows = rows / torch.where(scale > 0, scale, 1.0)[:, None]
        tables, flat = _tables(self.bits, signed, scale), rows.view(-1)[: hi - lo]
        if noise is None:
            codes = tables.nearest(flat)
        else:
            codes = tables.between(flat, noise.bits16(hi - lo, lo, turn=turn, device=x.device))
        if self.up_from_zero and not signed:
            codes += (codes == 0) & (flat > 0)
        if self.bits == 8:
            parts[name][lo:hi] = codes
        else:
            parts[name][lo // 2 : -(-hi // 2)] = self._pack(codes)

    def bytes(self, n: int) -> int:
        return -(-n * self.bits // 8) + 4 * -(-n // self.block)

    @staticmethod
    def _name(parts: Parts) -> tuple[str, bool]:
        return ("codes", True) if "codes" in parts else ("ucodes", False)

    def _pack(self, codes: Tensor) -> Tensor:
        """4 bits: element 2i in the low half of byte i."""
        if self.bits == 8:
            return codes
        pairs = F.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        return pairs[:, 0] | (pairs[:, 1] << 4)

    def _unpack(self, stored: Tensor, lo: int, hi: int) -> Tensor:
        if self.bits == 8:
            return stored[lo:hi]
        b = stored[lo // 2 : -(-hi // 2)]
        return torch.stack((b & 15, b >> 4), -1).view(-1)[: hi - lo]


def Block8() -> Block:  # noqa: N802 -- named like the classes beside it
    """8 bits, blocks of 256: 1.016 bytes per element."""
    return Block(8, 256)


def Block4() -> Block:  # noqa: N802
    """4 bits, blocks of 128: 0.531 bytes per element."""
    return Block(4, 128)


#: tensors smaller than this keep fp32 state under block codecs (bitsandbytes' rule)
SMALL = 4096

CODECS: dict[str, Codec] = {"fp32": Plain(), "bf16": Bf16(), "8bit": Block8(), "4bit": Block4()}


def form_bytes(name: str, n: int, itemsize: int = 4) -> int:
    """Bytes of one moment of n elements kept in this form, beside weights of `itemsize` bytes:
    beside fp64 it is fp64, and a block codec leaves less than SMALL elements in fp32."""
    form = codec(name)
    if itemsize < 8 and (n >= SMALL or not isinstance(form, Block)):
        return form.bytes(n)
    return n * max(itemsize, 4)


def codec(name: str) -> Codec:
    """The codec called fp32, bf16, 8bit or 4bit."""
    if name not in CODECS:
        raise RecipeError(f"no codec {name!r} for optimizer state{nearest(name, CODECS)}; "
                          f"there are {', '.join(CODECS)}")
    return CODECS[name]


def stochastic_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16 with E[result] = x, given uniform 16-bit integers (int32).

    The integer is added to the bits that bf16 drops, which are then cut off. Infinities and NaN
    pass; a finite value whose carry would reach infinity is cut instead.
    """
    raw = x.contiguous().view(torch.int32)
    up = ((raw + bits) & -65536).view(torch.float32)
    cut = (raw & -65536).view(torch.float32)
    up = torch.where(torch.isfinite(up), up, cut)
    return torch.where(torch.isfinite(x), up, x).to(torch.bfloat16)


class _Tables(NamedTuple):
    """A map on one device, and the way to its nearest entry without a search.

    coarse: for the upper 16 bits of an fp32 number, the entry nearest to the lower end of the
    numbers that share them. Entries lie so far apart that at most one midpoint falls among those,
    so one comparison with the next midpoint decides (a binary search takes ten times as long).
    """

    entries: Tensor
    middles: Tensor
    coarse: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """uint8 codes of a flat fp32 tensor with values in [-1, 1]."""
        code = self.coarse.index_select(0, (x.view(torch.int32) >> 16) & 0xFFFF)
        return code.add_(x > self.middles.index_select(0, code.int()))


    def between(self, x: Tensor, bits: Tensor) -> Tensor:
        """uint8 codes with E[entry] = x, given uniform 16-bit integers."""
        code = self.nearest(x).int()
        low = code.sub_((self.entries.index_select(0, code) > x).int()).clamp_(min=0)
        high = (low + 1).clamp_(max=len(self.entries) - 1)
        floor = self.entries.index_select(0, low)
        width = self.entries.index_select(0, high).sub_(floor).clamp_(min=1e-30)
        up = bits.to(x.dtype).add_(0.5).div_(1 << 16).mul_(width) < x - floor
        return torch.where(up, high, low).to(torch.uint8)


_TABLES: dict[tuple[int, bool, torch.device], _Tables] = {}


def _tables(bits: int, signed: bool, like: Tensor) -> _Tables:
    """The tables on the device of `like`; made once, outside of whatever watches the step."""
    mode = getattr(like, "fake_mode", None)
    home = _TABLES if mode is None else mode.__dict__.setdefault("_burnish_tables", {})
    key = (bits, signed, like.device)
    if key not in home:
        with _disable_current_modes():
            tables = _made(bits, signed, torch.device("cpu") if mode else like.device)
            if mode is not None:                  # a fake tensor's tables live with its mode
                tables = _Tables(*(mode.from_tensor(t) for t in tables))
                if like.device.type != "cpu":
                    tables = _Tables(*(t.to(like.device) for t in tables))
            home[key] = tables
    return home[key]


def _made(bits: int, signed: bool, device: torch.device) -> _Tables:
    entries = torch.tensor(dynamic_map(bits, signed), dtype=torch.float32, device=device)
    inf = torch.full((1,), float("inf"), device=device)
    middles = torch.cat(((entries[1:] + entries[:-1]) / 2, inf))
    high = torch.arange(1 << 16, dtype=torch.int32, device=device)
    low_end = torch.where(high < 1 << 15, high, high + 1)      # below zero: the larger magnitude
    lowest = (low_end << 16).view(torch.float32)
    coarse = torch.bucketize(lowest, middles[:-1]).to(torch.uint8)
    return _Tables(entries, middles, coarse)
