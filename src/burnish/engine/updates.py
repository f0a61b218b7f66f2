"""What an adapter adds to each weight, as it is asked about: its size, its directions, its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.weight import spectrum
from ..blocks.weight.term import Term, Wrap
from ..core.site import Place
from .slot import Slot, slots
from .starts import with_starts

if TYPE_CHECKING:
    from .tuned import Tuned


@dataclass
class Update:
    """``Delta = W' - W`` of one matrix (out, in), or of experts (experts, out, in)."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def base(self) -> Tensor:
        """W, without the update, as the model answers with the recipe off (what a storage makes of
        it, then); a view where the model holds it."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Delta, in fp32 at least."""
        raise NotImplementedError

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """(A, B) with ``Delta = B A`` where it is known as one."""
        return None

    def values(self, most: int | None = None) -> Tensor | None:
        """Singular values, falling: of the pair where there is one, else of the whole matrix; None
        where that costs more than `most` operations, or there are several matrices."""
        out, inp = self.shape[-2:]
        if len(self.shape) > 2:
            return None
        known = self.pair()
        if known is not None and known[0].shape[0] < min(out, inp):
            return spectrum.pair_values(*known)
        return None if most is not None and self.numel * min(out, inp) > most else \
            spectrum.values(self.delta())


@dataclass
class Added(Update):
    """Terms beside a weight, and at most one function of it."""

    slot: Slot
    module: nn.Module
    place: Place
    terms: list[tuple[Term, float]] = field(default_factory=list)

    def base(self) -> Tensor:
        param = self.place.param
        stored = self.slot._stored(self.module, param)
        if any(p.place.param == param for p in self.slot.absorbed):    # active starts are left out
            stored = with_starts(self.slot, self.slot._modules[self.slot.providers[param]].weight(),
                                 param, active={})
        return self.place.view(stored).detach()

    def _split(self) -> tuple[list[tuple[Term, float]], Wrap | None]:
        wraps = [t for t, _ in self.terms if isinstance(t, Wrap)]
        return [(t, s) for t, s in self.terms if not isinstance(t, Wrap)], \
            wraps[0] if wraps else None

    def pair(self) -> tuple[Tensor, Tensor] | None:
        terms, wrap = self._split()
        if wrap is not None:
            return wrap.low_rank_of(self.base()) if not terms else None
        known = [(t.low_rank(), s) for t, s in terms]
        if any(p is None or p[0].dim() != 2 for p, _ in known):
            return None
        return (torch.cat([p[0] for p, _ in known if p]),
                torch.cat([s * p[1] for p, s in known if p], 1))

    def delta(self) -> Tensor:
        terms, wrap = self._split()
        total: Any = 0
        for term, s in terms:
            total = total + s * term.final().detach().float()
            if getattr(term, "folded", False):   # a storage holds W less what it began with
                total = total - s * term.start().float()
        if wrap is None:
            return total
        V = self.base().float()
        return wrap.of(V + total).detach() - V


@dataclass
class Trained(Update):
    """A weight that trained whole, against what it was."""

    tuned: Any
    place: Place | None

    def _seen(self, stored: Tensor) -> Tensor:
        return stored.flatten(1) if self.place is None else self.place.view(stored)

    def base(self) -> Tensor:
        path, _, leaf = self.name.rpartition(".")
        return self._seen(self.tuned.originals.get(path, leaf))

    def delta(self) -> Tensor:
        now = self._seen(self.tuned.model.get_parameter(self.name).detach())
        return now.float().cpu() - self.base().float().cpu()


@torch.no_grad()
def updates(tuned: Tuned) -> Iterator[Update]:
    """One for each matrix that what is active adds to, then one for each that trained whole; a new
    head has nothing it could be compared with. Nothing is computed before it is asked for."""
    active = dict(tuned.state.active)
    for _, module, slot in slots(tuned.model):
        here: dict[Place, Added] = {}
        for part in slot.parts:
            term = slot.module_of(part)
            if part.place is None or part.adapter not in active or not isinstance(term, Term) \
                    or term.mirrors:
                continue
            place = part.place
            lead = (place.experts,) if place.experts else ()
            found = here.setdefault(place, Added(place.name, (*lead, place.out, place.inp), slot,
                                                 module, place))
            found.terms.append((term, active[part.adapter]))
        yield from here.values()
    heads = tuple(f"{h}." for h in tuned.anatomy.head)
    places = {p.name: p for p in tuned.anatomy.places}
    chosen = dict.fromkeys(n for a in active for n in tuned.adapters[a].selected)
    for name in chosen:
        shape = tuned.model.get_parameter(name).shape
        path, _, leaf = name.rpartition(".")
        if len(shape) < 2 or name.startswith(heads) or (path, leaf) not in tuned.originals:
            continue
        place = places.get(name)
        if place is not None and place.experts:
            place = None
        yield Trained(name, (place.out, place.inp) if place is not None else
                      (shape[0], shape[1:].numel()), tuned, place)
