"""State codecs: in what form a moment is stored between steps.

A codec turns a flat fp32 tensor into a few small tensors and back, any slice of whole blocks at a
time, so a step never holds more of the decoded state than the slice it works on::

    parts = codec.empty(n, signed, device)         # codes of zero
    x = codec.read(parts, lo, hi)                  # fp32; a view of the state where it is fp32
    codec.write(parts, lo, hi, x)                  # back to codes

and the slices of several tensors at once, as one flat tensor that is worked on by few kernels::

    values, flat = codec.load([parts, ...], [(lo, hi), ...])
    codec.save([parts, ...], [(lo, hi), ...], values, flat, [noise, ...], turn)

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...core.errors import RecipeError, nearest
from .noise import CounterNoise, halves

Parts = dict[str, Tensor]
Spans = Sequence[tuple[int, int]]
Streams = Sequence[CounterNoise]


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
    """See the module. `lo` and `hi` are multiples of `block` (`hi` may be the end; of several spans
    only the last one's)."""

    block: int
    view: ClassVar[bool]              # `load` gives views: changed in place, not saved again

    def empty(self, n: int, signed: bool, device: torch.device) -> Parts: ...
    def load(self, parts: Sequence[Parts], spans: Spans) -> tuple[list[Tensor], Tensor | None]: ...
    def save(self, parts: Sequence[Parts], spans: Spans, values: list[Tensor], flat: Tensor | None,
             noise: Streams | None = None, turn: int = 0) -> None: ...
    def read(self, parts: Parts, lo: int, hi: int) -> Tensor: ...
    def write(self, parts: Parts, lo: int, hi: int, x: Tensor,
              noise: CounterNoise | None = None, turn: int = 0) -> None: ...
    def bytes(self, n: int) -> int: ...


class _One:
    """One slice of one tensor: the list of one."""

    def read(self: Any, parts: Parts, lo: int, hi: int) -> Tensor:
        return self.load([parts], [(lo, hi)])[0][0]

    def write(self: Any, parts: Parts, lo: int, hi: int, x: Tensor,
              noise: CounterNoise | None = None, turn: int = 0) -> None:
        self.save([parts], [(lo, hi)], [x], x, None if noise is None else [noise], turn)


def split(flat: Tensor, spans: Spans) -> list[Tensor]:
    """Views of a flat tensor, one per span."""
    return [flat] if len(spans) == 1 else list(flat.split([hi - lo for lo, hi in spans]))


def _like(flat: Tensor, pieces: list[Tensor]) -> list[Tensor]:
    return [flat] if len(pieces) == 1 else list(flat.split([p.numel() for p in pieces]))


@dataclass(frozen=True)
class Plain(_One):
    """The state as it is: fp32 (fp64 beside fp64 weights). `load` gives views."""

    view: ClassVar[bool] = True

    dtype: torch.dtype = torch.float32
    block: int = 1

    def empty(self, n: int, signed: bool, device: torch.device) -> Parts:
        return {"": torch.zeros(n, dtype=self.dtype, device=device)}

    def load(self, parts: Sequence[Parts], spans: Spans) -> tuple[list[Tensor], Tensor | None]:
        return _stored(parts, "", spans), None

    def save(self, parts: Sequence[Parts], spans: Spans, values: list[Tensor], flat: Tensor | None,
             noise: Streams | None = None, turn: int = 0) -> None:
        torch._foreach_copy_(self.load(parts, spans)[0], values)

    def bytes(self, n: int) -> int:
        return n * self.dtype.itemsize


@dataclass(frozen=True)
class Bf16(_One):
    """bf16 state. Stochastic rounding by default: with nearest rounding a second moment whose
    decay is 0.999 never moves, because its changes are smaller than half a spacing."""

    view: ClassVar[bool] = False

    stochastic: bool = True
    block: int = 1

    def empty(self, n: int, signed: bool, device: torch.device) -> Parts:
        return {"": torch.zeros(n, dtype=torch.bfloat16, device=device)}

    def load(self, parts: Sequence[Parts], spans: Spans) -> tuple[list[Tensor], Tensor | None]:
        stored = _stored(parts, "", spans)
        flat = torch.empty(sum(s.numel() for s in stored), device=stored[0].device)
        values = split(flat, spans)
        torch._foreach_copy_(values, stored)
        return values, flat

    def save(self, parts: Sequence[Parts], spans: Spans, values: list[Tensor], flat: Tensor | None,
             noise: Streams | None = None, turn: int = 0) -> None:
        if self.stochastic and noise is not None:
            values = split(stochastic_bf16(flat, halves(noise, spans, turn, flat.device)), spans)
        torch._foreach_copy_(_stored(parts, "", spans), values)

    def bytes(self, n: int) -> int:
        return 2 * n


def _stored(parts: Sequence[Parts], name: str, spans: Spans) -> list[Tensor]:
    flat = [p[name].view(-1) for p in parts]
    return [x if hi - lo == x.numel() else x[lo:hi]
            for x, (lo, hi) in zip(flat, spans, strict=True)]


@dataclass(frozen=True)
class Block(_One):
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

    def load(self, parts: Sequence[Parts], spans: Spans) -> tuple[list[Tensor], Tensor | None]:
        name, signed = self._name(parts[0])
        stored, scales = self._stored(parts, name, spans)
        scale = scales[0] if len(scales) == 1 else torch.cat(scales)
        codes = self._unpack(stored[0] if len(stored) == 1 else torch.cat(stored))
        if (n := sum(hi - lo for lo, hi in spans)) < codes.numel():    # half of a last byte
            codes = codes[:n]
        x = _tables(self.bits, signed, scale).entries.index_select(0, codes.int())
        self._by_block(torch.mul, x, scale, x)
        return split(x, spans), x

    def save(self, parts: Sequence[Parts], spans: Spans, values: list[Tensor], flat: Tensor | None,
             noise: Streams | None = None, turn: int = 0) -> None:
        name, signed = self._name(parts[0])
        stored, scales = self._stored(parts, name, spans)
        x = flat.float()
        whole = x.numel() // self.block * self.block
        tops = [x[:whole].view(-1, self.block).abs().amax(1)] if whole else []
        if whole < x.numel():
            tops.append(x[whole:].abs().amax(0, keepdim=True))
        scale = tops[0] if len(tops) == 1 else torch.cat(tops)
        torch._foreach_copy_(scales, _like(scale, scales))
        x = self._by_block(torch.div, x, torch.where(scale > 0, scale, 1.0), torch.empty_like(x))
        tables = _tables(self.bits, signed, scale)
        if noise is None:
            codes = tables.nearest(x)
            if self.up_from_zero and not signed:
                codes += (codes == 0) & (x > 0)
        else:
            bits = halves(noise, spans, turn, x.device)
            codes = tables.between(x, bits, up_from_zero=self.up_from_zero and not signed)
        codes = self._pack(codes)
        torch._foreach_copy_(stored, _like(codes, stored))

    def _stored(self, parts: Sequence[Parts], name: str, spans: Spans
                ) -> tuple[list[Tensor], list[Tensor]]:
        """Slices of (codes, largest magnitudes)."""
        per, block = 8 // self.bits, self.block
        both = list(zip(parts, spans, strict=True))
        return ([p[name][lo // per : -(-hi // per)] for p, (lo, hi) in both],
                [p["absmax"][lo // block : -(-hi // block)] for p, (lo, hi) in both])

    def _by_block(self, op: Callable[..., Tensor], x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """x op the scale of its block; the last block may be short."""
        whole = x.numel() // self.block
        end = whole * self.block
        if whole:
            op(x[:end].view(whole, -1), scale[:whole, None], out=out[:end].view(whole, -1))
        if end < x.numel():
            op(x[end:], scale[whole:], out=out[end:])
        return out

    def bytes(self, n: int) -> int:
        return -(-n * self.bits // 8) + 4 * -(-n // self.block)

    @staticmethod
    def _name(parts: Parts) -> tuple[str, bool]:
        return ("codes", True) if "codes" in parts else ("ucodes", False)

    def _pack(self, codes: Tensor) -> Tensor:
        """4 bits: element 2i in the low half of byte i."""
        if self.bits == 8:
            return codes
        if codes.numel() % 2:
            codes = F.pad(codes, (0, 1))
        pairs = codes.view(torch.int16)                # low byte: the first of the two
        return (pairs | pairs >> 4).to(torch.uint8)

    def _unpack(self, b: Tensor) -> Tensor:
        if self.bits == 8:
            return b
        pairs = b.to(torch.int16)
        return (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)


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


#: the largest finite number of bf16
_TOP = float(torch.finfo(torch.bfloat16).max)


def stochastic_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16 with E[result] = x, given uniform 16-bit integers (int32).

    The integer is added to the bits that bf16 drops, which are then cut off. Infinities and NaN
    pass; a finite value whose carry would reach infinity is cut instead.
    """
    up = torch.add(x.contiguous().view(torch.int32), bits).bitwise_and_(-65536).view(torch.float32)
    # 2^-40 of x is below half a spacing of any result, so only infinities and NaN come through it
    return up.clamp_(-_TOP, _TOP).add_(x, alpha=2.0**-40).to(torch.bfloat16)


class _Tables(NamedTuple):
    """A map on one device, and the way to a code without a search.

    coarse, floor: for the upper 16 bits of an fp32 number, the entry nearest to the lower end of
    the numbers that share them; and one more than the last entry not above that end. Entries lie so
    far apart that at most one of them, and one midpoint, falls among those, so one comparison with
    the next decides (a binary search takes ten times as long).
    next: the entries, and infinity.  widths: 2^-16 of the way from each entry to the next; lifted:
    0 from entry 0, where then nothing stays that is above it.
    """

    entries: Tensor
    middles: Tensor
    coarse: Tensor
    floor: Tensor
    next: Tensor
    widths: Tensor
    lifted: Tensor

    def nearest(self, x: Tensor) -> Tensor:
        """uint8 codes of a flat fp32 tensor with values in [-1, 1]."""
        code = self.coarse.index_select(0, (x.view(torch.int32) >> 16) & 0xFFFF)
        return code.add_(x > self.middles.index_select(0, code.int()))

    def between(self, x: Tensor, bits: Tensor, up_from_zero: bool = False) -> Tensor:
        """uint8 codes with E[entry] = x, given uniform 16-bit integers: between an entry e and the
        next, w above it, the upper one where ``(bits + 1/2) / 2^16 w < x - e``.

        A comparison is the sign bit of a difference: -1 or 0, in a third of the time.
        """
        low = self.floor.index_select(0, (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
        low += _below(x - self.next.index_select(0, low))
        share = (self.lifted if up_from_zero else self.widths).index_select(0, low)
        share *= bits.to(x.dtype).add_(0.5)
        low -= _below(share.sub_(x - self.next.index_select(0, low)))
        return low.clamp_(max=self.entries.numel() - 1).to(torch.uint8)


def _below(x: Tensor) -> Tensor:
    """-1 where x < 0, else 0."""
    return x.view(torch.int32) >> 31


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
    first = torch.where(high < 1 << 15, high << 16, (high << 16) | 0xFFFF).view(torch.float32)
    floor = torch.bucketize(first, entries, right=True, out_int32=True)
    after = torch.cat((entries, inf))
    widths = torch.cat((after.diff(), inf)) / (1 << 16)
    lifted = widths.clone()
    lifted[0] = 0.0
    return _Tables(entries, middles, coarse, floor.clamp_(1, len(entries)), after, widths, lifted)
