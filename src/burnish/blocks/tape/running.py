"""Codes on ranges that many steps have seen, one for a run of channels (Mesa).

A site is one reader of a kept tensor: the block that runs and how many tensors it has kept before
(:class:`Sites`), the same in every step and when a block runs again. The channels of a site go in
runs of `group`; over all tokens of a step a run has the least value m and the largest M, and its
range moves by

    lo <- d lo + (1 - d) m        hi <- d hi + (1 - d) M        s = (hi - lo) / (2^k - 1)

once a step, beginning at those of the first step. Values are cut to it and rounded at random:

    x' = min(max(x, lo), hi)      q = floor((x' - lo) / s + u)      x^ = lo + s q,  E[x^] = x'

so what lies within the range is right in the mean, and what has left it lately is not. Bytes: k/8
per value and two numbers per run of channels, whatever the tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..state.prompts import Listener
from .codes import Codes, Part, packed, pieces, unpacked

#: (path of a block, or "" beside blocks; how many tensors were kept before)
Site = tuple[str, int]


class _Here(threading.local):
    path = ""
    count = 0


_here = _Here()


def site() -> Site:
    """The name of the next tensor that is kept; one that is asked for twice is two."""
    _here.count += 1
    return _here.path, _here.count - 1


class Sites(Listener):
    """Listens to a block, or the model: what is kept in it is counted from 0 in every run."""

    changes = False

    def __init__(self, state: Any, adapter: str, path: str):
        super().__init__(state, adapter)
        self.path = path

    def check(self, call: Any) -> None:
        pass                                         # it changes no number

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        was = _here.path, _here.count
        _here.path, _here.count = self.path, 0
        try:
            return call(*args, **kw)
        finally:
            _here.path, _here.count = was


class Ranges:
    """lo and hi of every site, and the step that has moved them last. decay: d."""

    def __init__(self, decay: float):
        self.decay = decay
        self.held: dict[Site, Tensor] = {}           # (2, runs of channels)
        self.moved: set[Site] = set()                # in this step

    def begin(self) -> None:
        """A step begins."""
        self.moved.clear()

    def of(self, at: Site, least: Tensor, most: Tensor) -> Tensor:
        """The range of a site, which a step moves once. A step that is not finite moves none."""
        now, was = torch.stack([least, most]), self.held.get(at)
        if was is None or was.shape != now.shape:
            was = now
        elif at not in self.moved:
            was = was.to(now)
            on = torch.where(was.isfinite(), self.decay * was + (1 - self.decay) * now, now)
            was = torch.where(now.isfinite(), on, was)
        self.moved.add(at)
        self.held[at] = was
        return was

    def state(self) -> dict[str, Tensor]:
        return {f"{path}:{n}": t for (path, n), t in self.held.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.held = {}
        for key, t in state.items():
            path, _, n = key.rpartition(":")
            self.held[path, int(n)] = t


class Running(Codes):
    """Codes of rows of D channels. tensors: (codes, least values, steps), the last two one for each
    run of `group[0]` channels; group: (channels in a run, D)."""

    @classmethod
    @torch.no_grad()
    def on(cls, ranges: Ranges, at: Site, part: Part, n: int, bits: int, group: tuple[int, int],
           like: Tensor, generator: torch.Generator | None) -> Running:
        """As :meth:`Codes.of`; `part` is asked twice."""
        wide = torch.promote_types(like.dtype, torch.float32)
        run, D = group
        per, top, runs = 8 // bits, 2 ** bits - 1, -(-D // run)
        least = torch.full((runs,), float("inf"), dtype=wide, device=like.device)
        most = -least
        for a, b in cls.pieces(n, D):
            v = part(a, b).to(wide).view(-1, D)
            for k in range(runs):
                mine = v[:, k * run:(k + 1) * run]
                least[k] = torch.minimum(least[k], mine.amin())
                most[k] = torch.maximum(most[k], mine.amax())
        low, high = ranges.of(at, least, most)
        step = (high - low) / top
        codes = torch.empty(-(-n // per), dtype=torch.uint8, device=like.device)
        z, s = (_spread(t, run, D) for t in (low, step))
        for a, b in cls.pieces(n, D):
            v = part(a, b).to(wide).view(-1, D)
            u = torch.rand(v.shape, generator=generator, dtype=wide, device=like.device)
            q = (v - z).div_(s.masked_fill(s == 0, 1)).clamp_(0, top).add_(u).floor_()
            codes[a // per:-(-b // per)] = packed(q.clamp_(0, top).to(torch.uint8).view(-1), bits)
        return cls((codes, low, step), n, bits, group, like.dtype)

    def part(self, a: int, b: int) -> Tensor:
        """Values a..b; a begins a row."""
        codes, low, step = self.tensors
        per, (run, D) = 8 // self.bits, self.group
        q = unpacked(codes[a // per:-(-b // per)], self.bits, b - a).to(step.dtype).view(-1, D)
        return q.mul_(_spread(step, run, D)).add_(_spread(low, run, D)).view(-1)

    @staticmethod
    def pieces(n: int, D: int) -> Iterator[tuple[int, int]]:
        return pieces(n, 8 * D)                      # (whole bytes, whatever D)

    def runs(self, unit: int = 1) -> Iterator[tuple[int, int]]:
        return self.pieces(self.n, self.group[1])

    @staticmethod
    def nbytes(n: int, bits: Any, group: Any, dtype: torch.dtype) -> int:
        """Bytes of the codes of n values, whose ranges are the site's."""
        return -(-n // (8 // bits))


def width(t: Tensor) -> int:
    """Of how many channels the rows of a tensor's storage are; 1 where it does not say."""
    whole = t._base if t._base is not None else t
    plain = whole.is_contiguous() and whole.dim() > 1 and \
        whole.numel() * whole.element_size() == whole.untyped_storage().nbytes()
    return whole.shape[-1] if plain else 1


def _spread(t: Tensor, run: int, D: int) -> Tensor:
    """One number per channel, of one per run."""
    return t.repeat_interleave(run)[:D]
