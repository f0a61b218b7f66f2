"""Noise that is never stored: streams that are drawn again, and the log that replays a run.

``z = CounterNoise(seed, key).normal(n, offset)`` is a function of (seed, key, turn, element) and of
the kind of device: the same numbers come back in any order, whole or sharded. Every panel of a
stream is drawn by torch's own generator, seeded with a hash of its place, so a draw costs what
``randn`` costs.

``PortableNoise`` gives the same numbers on *every* device, at about fifteen times the price on a
CPU: Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011) in int64
tensor arithmetic; the normals are Box-Muller in fp32 whose logarithm and sine are short polynomials
of IEEE additions and multiplications, which every device rounds alike.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.errors import FormatError
from ...core.followed import is_fake
from ...core.reading import reading

Word = Tensor | int

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57      # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85      # key increments (Weyl sequence)
_ROUNDS = 10
_PANEL = 1 << 16                       # counters per pass: the words stay in cache
#: elements per seed of a generator: seeding costs what three hundred normals cost on a CPU
_CPU_PANEL, _DEVICE_PANEL = 1 << 14, 1 << 20


def philox(counter: Sequence[Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four 32-bit counter words (int64 tensors or ints) to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1    # 64-bit products; the sign bit is data
        c0, c1, c2, c3 = (((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK,
                          ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK)
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def fold(*parts: object) -> int:
    """A stable 64-bit hash of a tuple of strings and ints (Python's `hash` changes per run)."""
    text = "\x1f".join(str(p) for p in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def log_unit(word: Tensor) -> Tensor:
    """ln((word + 1/2) / 2^32) in fp32, by exponent and an odd series around 1."""
    m, e = torch.frexp((word * 2 + 1).to(torch.float32))       # m in [1/2, 1)
    low = m < math.sqrt(0.5)                                    # bring m to [0.707, 1.414)
    m = torch.where(low, m * 2, m)
    e = (e - low.to(e.dtype) - 33).to(torch.float32)
    s = (m - 1) / (m + 1)                                       # ln m = 2 artanh s
    s2 = s * s
    series = s2.mul(1 / 11).add_(1 / 9)
    for c in (1 / 7, 1 / 5, 1 / 3, 1.0):
        series.mul_(s2).add_(c)
    return series.mul_(s).mul_(2).add_(e.mul_(math.log(2)))


def circle(word: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of a uniform angle: two bits choose the quarter, thirty the angle within it."""
    x = ((word & 0x3FFFFFFF) - (1 << 29)).to(torch.float32).mul_(math.pi / 2 / (1 << 30))
    x2 = x * x
    sin = x2.mul(1 / 362880).sub_(1 / 5040)
    for c in (1 / 120, -1 / 6, 1.0):
        sin.mul_(x2).add_(c)
    sin.mul_(x)
    cos = x2.mul(-1 / 3628800).add_(1 / 40320)
    for c in (-1 / 720, 1 / 24, -0.5, 1.0):
        cos.mul_(x2).add_(c)
    quarter = word >> 30
    odd = (quarter & 1).bool()
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    sign = (1 - (quarter & 2)).to(torch.float32)
    return cos.mul_(sign), sin.mul_(sign)


def _normals(words: Sequence[Tensor]) -> Tensor:
    """Four words to four independent N(0, 1) draws, last axis 4."""
    out = []
    for a, b in (words[:2], words[2:]):
        radius = log_unit(a).mul_(-2).clamp_(min=0).sqrt_()
        cos, sin = circle(b)
        out += [cos.mul_(radius), sin.mul_(radius)]
    return torch.stack(out, -1)


def _halves(words: Sequence[Tensor]) -> Tensor:
    """Four words to eight uniform integers in [0, 65535], last axis 8, int32."""
    return torch.stack([h for w in words for h in (w & 0xFFFF, w >> 16)], -1).to(torch.int32)


@dataclass(frozen=True)
class CounterNoise:
    """One stream per (seed, key): ``key`` names the tensor, ``offset`` the first element drawn."""

    seed: int
    key: str

    def normal(self, n: int, offset: int = 0, *, turn: int = 0,
               device: torch.device | str | None = None) -> Tensor:
        """Elements offset .. offset + n of z ~ N(0, 1), fp32. `turn` is a step of the stream."""
        out = torch.empty(n, device=device)
        self._seeded("normal", out, offset, turn, torch.Tensor.normal_, torch.Generator(out.device))
        return out

    def bits16(self, n: int, offset: int = 0, *, turn: int = 0,
               device: torch.device | str | None = None) -> Tensor:
        """Elements offset .. offset + n of uniform integers in [0, 65535], int32.

        A word of 64 random bits is four of them: one draw of a generator costs more than all the
        arithmetic of a rounding.
        """
        first, stop = offset // 4, -(-(offset + n) // 4)
        words = torch.empty(stop - first, dtype=torch.int64, device=device)
        self._words(words, first, turn, torch.Generator(words.device))
        lanes = words.view(torch.int16)[offset - 4 * first : offset - 4 * first + n]
        return lanes.to(torch.int32).add_(1 << 15)

    def uniform(self, n: int, offset: int = 0, *, turn: int = 0,
                device: torch.device | str | None = None) -> Tensor:
        """Elements offset .. offset + n of u ~ U(0, 1), fp32: the middles of 2^23 equal steps, so
        neither end is ever drawn."""
        halves = self.bits16(2 * n, 2 * offset, turn=turn, device=device).view(n, 2)
        return ((halves[:, 0] << 7) + (halves[:, 1] >> 9)).float().add_(0.5).mul_(2.0**-23)

    def _words(self, out: Tensor, first: int, turn: int, generator: torch.Generator) -> None:
        self._seeded("words", out, first, turn, _any_word, generator)

    def _seeded(self, kind: str, out: Tensor, offset: int, turn: int,
                draw: Callable[..., Tensor], generator: torch.Generator) -> None:
        """Fill `out` with elements of a stream, panel by panel."""
        if is_fake(out):
            return                                   # a simulation has no values
        n, cpu = out.numel(), out.device.type == "cpu"
        size = _CPU_PANEL if cpu else _DEVICE_PANEL
        for panel in range(offset // size, -(-(offset + n) // size)):
            first = panel * size
            lo, hi = max(first, offset), min(first + size, offset + n)
            generator.manual_seed(fold(self.seed, self.key, kind, turn, panel) >> 1)
            # on a CPU the first elements of a panel do not depend on how many follow, in whole
            # runs of 16; elsewhere they may, so a panel is drawn whole
            count = min(-(-(hi - first) // 16) * 16, size) if cpu else size
            here = out[lo - offset : hi - offset]
            exact = lo == first and hi - lo == count
            drawn = here if exact else torch.empty(count, dtype=out.dtype, device=out.device)
            draw(drawn, generator=generator)
            if not exact:
                here.copy_(drawn[lo - first : hi - first])


def halves(streams: Sequence[CounterNoise], spans: Sequence[tuple[int, int]], turn: int,
           device: torch.device) -> Tensor:
    """``bits16`` of a span of each stream, one behind another, at little more than a seed each."""
    if len(spans) == 1 or any(lo % 4 or hi % 4 for lo, hi in spans) \
            or any(type(s) is not CounterNoise for s in streams):
        drawn = [s.bits16(hi - lo, lo, turn=turn, device=device)
                 for s, (lo, hi) in zip(streams, spans, strict=True)]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)
    words = torch.empty(sum(hi - lo for lo, hi in spans) // 4, dtype=torch.int64, device=device)
    generator, at = torch.Generator(words.device), 0
    for s, (lo, hi) in zip(streams, spans, strict=True):
        end = at + (hi - lo) // 4
        s._words(words[at:end], lo // 4, turn, generator)
        at = end
    return words.view(torch.int16).to(torch.int32).add_(1 << 15)


def _any_word(out: Tensor, generator: torch.Generator) -> Tensor:
    """All 64 bits of each element."""
    return out.random_(-(1 << 63), None, generator=generator)


@dataclass(frozen=True)
class PortableNoise(CounterNoise):
    """The same interface; the same numbers on every device."""

    def normal(self, n: int, offset: int = 0, *, turn: int = 0,
               device: torch.device | str | None = None) -> Tensor:
        return self._draw(n, offset, turn, device, 4, _normals, torch.float32)

    def bits16(self, n: int, offset: int = 0, *, turn: int = 0,
               device: torch.device | str | None = None) -> Tensor:
        return self._draw(n, offset, turn, device, 8, _halves, torch.int32)

    def _draw(self, n: int, offset: int, turn: int, device: torch.device | str | None, lanes: int,
              finish: Callable[[Sequence[Tensor]], Tensor], dtype: torch.dtype) -> Tensor:
        h = fold(self.seed, self.key, lanes)
        key = (h & _MASK, h >> 32)
        out = torch.empty(n, dtype=dtype, device=device)
        first, stop = offset // lanes, -(-(offset + n) // lanes)
        for a in range(first, stop, _PANEL):
            b = min(a + _PANEL, stop)
            index = torch.arange(a, b, device=out.device, dtype=torch.int64)
            words = philox((index & _MASK, index >> 32, turn & _MASK, turn >> 32), key)
            lo, hi = max(a * lanes, offset), min(b * lanes, offset + n)
            drawn = finish(words).flatten()[lo - a * lanes : hi - a * lanes]
            out[lo - offset : hi - offset] = drawn
        return out


#: changes with the numbers that are drawn, so that no log of others is replayed
STREAM = 2

STREAMS: dict[str, type[CounterNoise]] = {"device": CounterNoise, "portable": PortableNoise}


def noise(seed: int, key: str, shape: Sequence[int], offset: int = 0, *,
          device: torch.device | str | None = None) -> Tensor:
    """``z ~ N(0, I)`` of `shape`, starting at flat element `offset` of the tensor named `key`."""
    return CounterNoise(seed, key).normal(math.prod(shape), offset, device=device).view(*shape)


@dataclass
class ScalarLog:
    """A zeroth-order run as scalars: one entry (seed, g, lr per group) per query.

    A run is its starting weights and this log: 4 bytes of seed, 4 of g and 8 per learning rate for
    each query. `header` holds what does not change (eps, decay, rounding...), in plain json.
    """

    header: dict[str, object] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    scalars: list[float] = field(default_factory=list)
    lrs: list[tuple[float, ...]] = field(default_factory=list)

    def append(self, seed: int, scalar: float, lr: Sequence[float]) -> None:
        """Record one query; `scalar` must already be a value of fp32 (see :func:`as_fp32`)."""
        self.seeds.append(seed)
        self.scalars.append(scalar)
        self.lrs.append(tuple(lr))

    def rests(self, names: Iterable[str]) -> None:
        """From the next entry on, these tensors stay where they are (a schedule's changes are kept
        in the header, as [first entry, names])."""
        names = sorted(names)
        periods: list[Any] = self.header.get("resting") or []  # type: ignore[assignment]
        if names != (periods[-1][1] if periods else []):
            self.header["resting"] = [*periods, [len(self), names]]

    def resting(self, index: int) -> frozenset[str]:
        """The tensors that stay at entry `index`."""
        periods: list[Any] = self.header.get("resting") or []  # type: ignore[assignment]
        return frozenset(next((names for first, names in reversed(periods) if first <= index), ()))

    def __len__(self) -> int:
        return len(self.seeds)

    def tensors(self) -> dict[str, Tensor]:
        """The log as tensors for a safetensors file (seed int32, g fp32, lr fp64)."""
        width = len(self.lrs[0]) if self.lrs else 0
        return {"seed": torch.tensor(self.seeds, dtype=torch.int32),
                "scalar": torch.tensor(self.scalars, dtype=torch.float32),
                "lr": torch.tensor(self.lrs, dtype=torch.float64).view(len(self), width)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor],
                     header: dict[str, object] | None = None) -> ScalarLog:
        """The inverse of :meth:`tensors`; FormatError as :meth:`check`."""
        if missing := {"seed", "scalar", "lr"} - set(tensors):
            raise FormatError(f"not a log of scalars: {', '.join(sorted(missing))} missing")
        with reading("a log of scalars"):
            log = cls(dict(header or {}), tensors["seed"].tolist(), tensors["scalar"].tolist(),
                      [tuple(row) for row in tensors["lr"].tolist()])
            log.check()
        return log

    def check(self, queries: int = 1) -> None:
        """FormatError for what no run writes: columns of several lengths and an update with fewer
        entries than `queries` (a log that was cut off), and what is no finite number."""
        many = {"seeds": len(self.seeds), "scalars": len(self.scalars), "rows of lr": len(self.lrs)}
        if len(set(many.values())) > 1:
            raise FormatError("a log of scalars that was cut off: it has " +
                              ", ".join(f"{n} {what}" for what, n in many.items()))
        if len(self) % queries:
            raise FormatError(f"a log of scalars that was cut off: an update has {queries} "
                              f"entries, and {len(self)} are no whole number of updates")
        for i, (seed, g, lrs) in enumerate(zip(self.seeds, self.scalars, self.lrs, strict=True)):
            if type(seed) is not int or len(lrs) != len(self.lrs[0]) or \
                    not all(math.isfinite(x) for x in (g, *lrs)):
                raise FormatError(f"a log of scalars whose entry {i} is damaged: seed {seed}, "
                                  f"scalar {g}, learning rates {lrs}")
        first, periods = self.header.get("first_update", 0), self.header.get("resting") or []
        if type(first) is not int or first < 0 or not isinstance(periods, list) or not all(
                type(begin) is int and all(isinstance(n, str) for n in names)
                for begin, names in periods):
            raise FormatError(f"a log of scalars whose header is damaged: first_update={first!r}, "
                              f"resting={periods!r}")


def as_fp32(x: float) -> float:
    """The nearest value of fp32: what a log keeps is what the update used."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)
