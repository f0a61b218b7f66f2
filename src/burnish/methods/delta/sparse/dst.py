from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ....blocks.choose import masks
from ....blocks.choose.budget import allocate
from ....blocks.choose.dropgrow import DropGrow, Seeking
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Dst(Method):
    """CL-DST: a sparse update whose entries move while it trains, task after task.

    ``W' = W + scatter(index_l, v_l)`` with k_l entries in matrix l, drawn at first. `layout`
    "uniform": ``k_l = density |W_l|``; "erk": ``k_l = eps (n_in + n_out + k_h + k_w)``, at most
    |W_l|, eps such that ``sum k_l = density sum |W_l|`` (the kernel's sides only of convolutions,
    and square). Every `every` updates the share `prune` of them, the least |v|, leave and as many
    come elsewhere, at 0: `growth` "random"; "unfired", drawn among those that never trained (when
    there are too few, among all others); "gradient", where ``|g^T x|`` is largest among those that
    do not train. Entries that stay keep their moments, those that come have none.

    A task is an adapter: ``tuned.add("two", "dst")`` starts on entries that no other has, and
    ``tuned.use({"one": 1, "two": 1}, train="two")`` trains it with the frozen ones in use. What
    task one says stays to the bit.

    Start: v = 0, the pre-trained function exactly. Trains sum k_l at any time. Kept for backward:
    x. "gradient" looks for the largest panel by panel in the backward before a move, of the last
    micro-batch; "unfired" holds a bit an entry. The file holds index and values. Merges exactly.

    Departures: what is sparse is the update of a pre-trained network, which stays whole, not a
    network trained from the beginning; growth by momentum is not offered, since entries that do
    not train have none. `prune` is our reading.
    """

    paper: ClassVar[str] = "Continual Learning with Dynamic Sparse Training, CPAL 2024"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("resize",)
    #: with seed 0 a unit of the small perceptron stands at the kink of its ReLU, which bf16 moves
    small: ClassVar[dict[str, int]] = {"seed": 1}

    density: float = setting(0.1, "share of the entries that train")
    layout: Literal["uniform", "erk"] = setting("uniform", "how they are shared among matrices")
    growth: Literal["random", "unfired", "gradient"] = setting("random", "which come")
    every: int = setting(100, "updates between two moves", alias=("deltaT", "interval"))
    prune: float = setting(0.3, "share of the entries that leave at a move", alias=("zeta",))
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or not 0 < self.prune <= 1 or self.every < 1:
            raise RecipeError("dst: density is a share in (0, 1), prune one in (0, 1] and every at "
                              f"least 1, got {self.density}, {self.prune} and {self.every}")

    def repeats(self) -> int | None:
        """Shares of "erk" depend on all matrices."""
        return 1 if self.layout == "uniform" else None

    def shares(self, places: Sequence[Place]) -> list[int]:
        """k_l, exactly the budget together."""
        sizes = [p.numel for p in places]
        sides = [p.out + p.inp // p.kernel + (2 * sqrt(p.kernel) if p.kind == "conv" else 0)
                 for p in places]
        if self.layout == "erk":
            return allocate(round(self.density * sum(sizes)), sides, sizes)
        return [self.count(p) for p in places]

    def delta(self, site: Site) -> Seeking:
        place, known = site.place, site.settled.get("entries")
        fired = self.growth == "unfired"
        if known is not None:
            return Seeking(place, masks.to_come(place, known), fired=fired)
        k = dict(zip(site.places, self.shares(site.places), strict=True))[place]
        taken = masks.occupied(site)
        free = place.numel - (0 if taken is None else taken.numel())
        if not 1 <= k <= free:
            raise RecipeError(f"dst: {k} entries of {place.name} are asked for, of which {free} "
                              f"are left; a density up to {free / place.numel:.2g} fits there")
        index = masks.drawn(place.numel, k, self.seed, place.name, taken)
        return Seeking(place, index.to(site.weight.device), fired=fired)

    def controller(self, tuned: Tuned) -> DropGrow:
        terms = dict(tuned.terms(Seeking))
        others = [t for name in tuned.adapters if name != tuned.active.name
                  for _, t in tuned.terms(Seeking, name)]
        for term in terms.values():
            term.barred = masks.had_by(term.place, [
                (t.place, t) for t in others
                if (t.place.path, t.place.param) == (term.place.path, term.place.param)])
        return DropGrow(terms, tuned.resize, self.every, self.prune, self.grow, room,
                        looks=self.growth == "gradient")

    def grow(self, term: Seeking, n: int, step: int) -> Tensor:
        """Who comes."""
        if self.growth == "gradient":
            return term.found
        taken = avoided(term)
        if self.growth == "unfired":
            ever = term.ever()[: term.place.numel].nonzero().squeeze(1)
            fresh = torch.cat([taken, ever]).unique()
            if term.place.numel - fresh.numel() >= n:
                taken = fresh
        return masks.drawn(term.place.numel, n, self.seed, f"{term.place.name}/{step}",
                           taken).to(taken.device)

    def per_token(self, place: Place) -> int:
        """Numbers kept per token besides the input."""
        return 0

    def count(self, place: Place, entries: int | None = None) -> int:
        """Trainable parameters on one matrix; entries: where "erk" has shared them out."""
        return max(1, round(self.density * place.numel)) if entries is None else entries


def avoided(term: Seeking) -> Tensor:
    """Positions that are had already, by this adapter or another, ascending."""
    own: Any = term.index.long()
    return own.sort().values if term.barred is None else torch.cat([own, term.barred]).unique()


def room(term: Seeking) -> int:
    """How many positions are had by nobody."""
    barred = 0 if term.barred is None else term.barred.numel()
    return term.place.numel - term.index.numel() - barred
