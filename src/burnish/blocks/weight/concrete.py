"""Updates behind hard concrete gates, of which a few entries stay in the end.

    Delta = z * w        s = sigmoid(log u - log(1 - u) + a)        z = clip(s (HIGH - LOW) + LOW)

u is uniform while gates are drawn, and 1/2 where they are not. A gate is open (z > 0) with
probability ``sigmoid(a - log(-LOW / HIGH)) = sigmoid(a)``: the expected number of entries has a
gradient.

Nothing that is drawn is held: the numbers of a panel are made again in backward, from the seed, the
place and the draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ...core.site import Place
from ..update.noise import CounterNoise
from .masked import most
from .sparse import SparseDelta

LOW, HIGH = -1.5, 1.5


def _open(a: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """(s, and s stretched) of gates a, at the drawn u (None: 1/2)."""
    if u is not None:
        u = u.to(torch.promote_types(a.dtype, u.dtype))
        a = a + (u.log() - (-u).log1p()).to(a.dtype)
    s = a.sigmoid()
    return s, s * (HIGH - LOW) + LOW


def hard(a: Tensor, u: Tensor | None = None) -> Tensor:
    """z, differentiable in a where it lies inside (0, 1)."""
    return _open(a, u)[1].clamp(0, 1)


def slope(a: Tensor, u: Tensor | None = None) -> Tensor:
    """dz / da."""
    s, wide = _open(a, u)
    return (s * (1 - s)).mul_(HIGH - LOW).mul_((wide > 0) & (wide < 1))


def opened(a: Tensor) -> Tensor:
    """The probability that a gate is open."""
    return a.sigmoid()


class Concrete(SparseDelta):
    """``Delta = z * w`` over all entries, until :meth:`project` leaves some without gates.

    values: w, (out in,), then those of the `index`. gate: a of each entry, then empty. turn: number
    of the draw; None: gates as they are with u = 1/2. entries: how many are left (None: all).
    """

    ranked: ClassVar[dict[str, int]] = {"values": 0, "gate": 0, "index": 0}
    #: a of a gate for the whole matrix
    group: nn.Parameter | None

    def __init__(self, place: Place, start: float, noise: CounterNoise,
                 entries: int | None = None, device: torch.device | None = None):
        found = torch.arange(entries or 0, device=device)
        super().__init__(place, found, portable=False, narrow=False)
        self.noise = noise
        self.turn: int | None = None
        n = place.numel if entries is None else entries
        self.values = nn.Parameter(torch.zeros(n, device=device))
        gates = place.numel if entries is None else 0
        self.gate = nn.Parameter(torch.full((gates,), start, device=device))
        self.register_parameter("group", None)
        self.counted = None if entries is None else self.settled()

    @property
    def decided(self) -> bool:
        return not self.gate.numel()

    def settled(self) -> dict[str, int]:
        """What a file must say so that a load makes the same shapes."""
        return {"entries": self.values.numel()} if self.decided else {}

    @property
    def keeps_input(self) -> bool:
        return self.values.numel() > 0 and super().keeps_input

    def entries(self) -> tuple[Tensor, Tensor] | None:
        return super().entries() if self.decided else None

    # -- while there are gates ---------------------------------------------------------------------
    def _drawn(self, i0: int, i1: int) -> Tensor | None:
        """u of columns i0:i1, (out, i1-i0). The stream runs down the columns: a panel is a run."""
        if self.turn is None:
            return None
        u = self.noise.uniform((i1 - i0) * self.out, i0 * self.out, turn=self.turn,
                               device=self.gate.device)
        return u.view(i1 - i0, self.out).t()

    def _drawn_once(self) -> Tensor | None:
        """u of the gate of the whole matrix, (1,), from behind the others."""
        return None if self.turn is None else self.noise.uniform(
            1, self.out * self.inp, turn=self.turn, device=self.gate.device)

    def _panel(self, flat: Tensor, i0: int, i1: int) -> Tensor:
        return flat.view(self.out, self.inp)[:, i0:i1]

    def _gated(self, i0: int, i1: int) -> Tensor:
        z = hard(self._panel(self.gate, i0, i1), self._drawn(i0, i1))
        if self.group is not None:
            z = z * hard(self.group, self._drawn_once())
        return z * self._panel(self.values, i0, i1)

    def dense(self) -> Tensor:
        return super().dense() if self.decided else self._gated(0, self.inp)

    @torch.no_grad()
    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        return super().tile(i0, i1, state) if self.decided else self._gated(i0, i1)

    @torch.no_grad()
    def pull(self, i0: int, i1: int, G: Tensor, state: object,
             grads: list[Tensor | None]) -> Tensor:
        if self.decided:
            return super().pull(i0, i1, G, state, grads)
        if grads[0] is None:
            theta = self.theta()
            grads[: len(theta)] = [torch.zeros_like(p) for p in theta]
        dw, da = (self._panel(g, i0, i1) for g in grads[:2] if g is not None)
        w, a = self._panel(self.values, i0, i1), self._panel(self.gate, i0, i1)
        u, G = self._drawn(i0, i1), G.to(w.dtype)
        z, dz = hard(a, u), slope(a, u).mul_(G).mul_(w)
        if self.group is not None:
            u, own = self._drawn_once(), cast(Tensor, grads[2])
            own += (z * G).flatten().dot(w.flatten()) * slope(self.group, u)
            whole = hard(self.group, u)
            z.mul_(whole)
            dz.mul_(whole)
        dw.addcmul_(z, G)
        da.add_(dz)
        return z.mul_(w)

    # -- the number of entries ---------------------------------------------------------------------
    def gates(self) -> tuple[nn.Parameter, ...]:
        return (self.gate,) if self.group is None else (self.gate, self.group)

    def expected(self) -> Tensor:
        """Of entries that are not zero: ``sum sigmoid(a) [sigmoid(group)]``; differentiable."""
        n = opened(self.gate).sum()
        return n if self.group is None or self.decided else n * opened(self.group)[0]

    @torch.no_grad()
    def pull_expected(self, weight: float) -> list[Tensor]:
        """Gradients of weight times it, one for each of `gates`."""
        p = opened(self.gate)
        da = (p * (1 - p)).mul_(weight)
        if self.group is None:
            return [da]
        q = opened(self.group)
        return [da.mul_(q), q * (1 - q) * (weight * p.sum())]

    @torch.no_grad()
    def left(self, most_of: int) -> tuple[Tensor, Tensor]:
        """(positions, ascending, and values z w) of so many entries, the largest in size; of equal
        ones those that come first."""
        delta = self.dense().flatten()
        at = most(delta.abs(), most_of).nonzero().squeeze(1)
        return at, delta[at]

    def project(self, index: Tensor, values: Tensor, resize: Callable[..., None]) -> None:
        """From now on the update is these entries, without gates; moments begin again. resize: as
        ``Tuned.resize``."""
        none = torch.arange(0)
        resize(self, keep=dict.fromkeys(self.ranked, none),
               fresh={"values": values, "index": index}, moments="drop")


class Grouped(Concrete):
    """``Delta = z_g z * w`` with one more gate for the whole matrix."""

    ranked: ClassVar[dict[str, int]] = {**Concrete.ranked, "group": 0}

    def __init__(self, place: Place, start: float, noise: CounterNoise,
                 entries: int | None = None, device: torch.device | None = None):
        super().__init__(place, start, noise, entries, device)
        self.group = nn.Parameter(torch.full((int(entries is None),), start, device=device))


def largest(terms: Sequence[Concrete], k: int) -> list[tuple[Tensor, Tensor]]:
    """(positions, values) of the k largest entries of all terms together, of each those that are
    its own: positions ascending. Of equal ones the earlier stays. Holds k candidates at a time."""
    owner = at = torch.zeros(0, dtype=torch.int64)
    values = torch.zeros(0)
    for i, term in enumerate(terms):
        where, found = (t.cpu() for t in term.left(k))
        owner = torch.cat([owner, torch.full_like(where, i)])
        at, values = torch.cat([at, where]), torch.cat([values.to(found), found])
        first = values.abs().argsort(descending=True, stable=True)[:k]
        owner, at, values = owner[first], at[first], values[first]
    out = []
    for i in range(len(terms)):
        mine = owner == i
        where, order = at[mine].sort()
        out.append((where, values[mine][order]))
    return out
