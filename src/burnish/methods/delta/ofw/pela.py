from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ....blocks.update.objective import OnWeights
from ....blocks.weight.replaced import Replaced, farthest, in_two
from ....blocks.weight.start import decomposed, split
from ....core.asked import wanted
from ....core.errors import ConfigError, RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Selection, Site
from ....core.targets import match

if TYPE_CHECKING:
    from ....core.anatomy import Anatomy
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Pela(Method):
    """PELA: two small matrices take the place of each weight, and are made good before tuning.

    ``y = (x A^T) B^T + b``, A (rank, in), B (out, rank), ``rank = floor(out in / (compression (out
    + in)))``, from the truncated decomposition ``W = U S V^T``: ``A = sqrt(S_r) V_r^T``, ``B = U_r
    sqrt(S_r)``. Beside the task's loss, over L matrices,

        weight / L sum (max_oi |B A - W|_oi - slack)^2

    whose gradient is that of the one largest entry. Features are held near those of the base by
    `feature_distill` beside it: ``pela + feature_distill``. The base is the teacher, so W stays in
    memory as long as that takes (``nf4 + pela``: in 4 bits). Then :meth:`lifecycle` gives the
    small model alone: ordinary linears, ``fc1.0`` and ``fc1.1``, for any recipe.

    Start: the best of that rank, not the pre-trained function. Trains rank (in + out) per matrix,
    with `rest` every other tensor of the model too, as published. Kept for backward: x and rank
    numbers per token. Merges exactly, to a weight of W's size. What another part adds to W would
    not be heard, and is refused; so is another function of W.
    """

    paper: ClassVar[str] = ("PELA: Learning Parameter-Efficient Models with Low-Rank Approximation "
                            "(2023), arXiv:2310.10700")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs: ClassVar[frozenset[str]] = frozenset({"linears"})
    small: ClassVar[dict[str, bool]] = {"rest": False}   # counts and bytes are of its own factors

    compression: float = setting(2.0, "rho: parameters of a weight over those of its factors",
                                 alias=("rho",), other=(1.25,))
    rest: bool = setting(True, "all else of the model trains too")
    weight: float = setting(0.0, "kappa_p, of the largest error", alias=("kappa_p",), other=(30.0,))
    slack: float = setting(1e-3, "largest error that costs nothing", alias=("epsilon",),
                           beside={"weight": 30.0}, other=(0.05,))

    def __post_init__(self) -> None:
        if not self.compression > 1:
            raise RecipeError(f"pela: compression={self.compression}: expected above 1, or nothing "
                              "gets smaller")
        if self.weight < 0 or self.slack < 0:
            raise RecipeError("pela: weight and slack are at least 0, or errors would be sought, "
                              f"got {self.weight} and {self.slack}")
        if "slack" in self.changed() and not self.weight:
            raise RecipeError("pela: slack does nothing beside weight=0")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def rank(self, place: Place) -> int:
        """Of a weight's factors."""
        return int(place.out * place.inp / (self.compression * (place.out + place.inp)))

    def delta(self, site: Site) -> Replaced:
        place, r, W = site.place, self.rank(site.place), site.weight
        if r < 1:
            raise RankError(f"pela: compression={self.compression} leaves no rank to {place.name} "
                            f"({place.out} x {place.inp}); leave it out of targets")
        if site.blank:
            wide = torch.promote_types(W.dtype, torch.float32)
            return Replaced(place, *(W.new_empty(s, dtype=wide)
                                     for s in ((r, place.inp), (place.out, r))))
        return Replaced(place, *decomposed(site, partial(_halves, r=r)))

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        if not self.rest:
            return
        places = wanted(anatomy, self) or match(anatomy)
        taken = {f"{p.path}.{p.param}" for p in places if p.kind in self.kinds and self.rank(p)}
        for name, p in anatomy.model.named_parameters():
            if p.is_floating_point() and name not in taken and ".burnish." not in f".{name}":
                yield Selection(name)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        terms = [t for _, t in tuned.terms(Replaced)] if self.weight else []
        for term in terms:
            yield OnWeights((term.A, term.B), partial(self._error, tuned, term, len(terms)))

    def _error(self, tuned: Tuned, term: Replaced, of: int) -> Tensor:
        W = tuned.weight(term.place)
        o, i = farthest(term.A, term.B, W)
        off = (term.B[o] @ term.A[:, i] - W[o, i].to(term.A.dtype)).abs()
        return self.weight / of * (off - self.slack).square()

    def lifecycle(self, tuned: Tuned) -> nn.Module:
        """The small model: all that was tuned is merged, and two linears stand in the place of
        each weight that was replaced. The handle holds what was, and `unmerge` brings it back."""
        terms = [t for _, t in tuned.terms(Replaced)]
        if not terms:
            raise ConfigError("pela: nothing is replaced in this model; tune it with pela first")
        if sliced := next((t.place for t in terms if t.place.rows), None):
            raise ConfigError(f"pela: {sliced.name} is rows of a weight that stays whole; target "
                              "the fused weight")
        model = tuned.merge()
        tuned.merged.first.append(in_two(model, [(t.place.path, t.A, t.B) for t in terms]))
        return model

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank(place)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank(place) * (place.out + place.inp)


def _halves(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return split(U[:, :r], S[:r], Vt[:r], 1.0)
