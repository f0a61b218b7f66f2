from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ....blocks.choose import masks
from ....blocks.choose.bilateral import remainder
from ....blocks.weight.factor import Chain
from ....blocks.weight.sparse import Few
from ....blocks.weight.start import decomposed
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Dsee(Method):
    """DSEE: a low-rank update, and beside it a few entries that low rank cannot reach.

    ``W' = W + s B A + scatter(index, v)``, A (rank, in), B (out, rank), s = alpha / rank, v
    (entries,). The index is fixed: the entries of W that a decomposition ``W = U V + S`` leaves
    largest (``mask="decomposed"``, greedy bilateral sketches of at most `iterations` growths by
    five, S what is above `threshold`), the largest of W ("magnitude"), or drawn ones ("random").
    ``dv_k = sum_n g[n, o_k] x[n, i_k]``.

    On a pruned backbone, ``W * M + s B A + scatter(index, v)``: write a storage beside it,
    ``magnitude + dsee`` (or wanda, gblm). The index is that of W as it was; what is zero stays so
    while this trains.

    Start: A uniform in +-1/sqrt(in), B = 0, v = 0: the pre-trained function exactly. Trains
    rank (in + out) + entries per matrix: BERT-base's queries and values with rank 8 and 64 entries
    296,448. Kept for backward: x, and rank numbers per token. Merges exactly, and a merge fills the
    zeros of a pruned backbone (``sparse_peft`` keeps them, and what it adds at them is lost). The
    file holds the index, 4 bytes an entry, unless it is drawn. A decomposition of a 768 x 768
    matrix takes seconds, of larger ones minutes. No weight decay.

    Departures: the backbone is pruned before this trains, by the storage's own ranking, not half
    way by one ranking of all weights; its structured form (heads by learnt coefficients) is not
    here: loraprune slices. (unconfirmed: v = 0 at the start, and that a decomposition begins with
    the first rows of R of W itself.)
    """

    paper: ClassVar[str] = ("DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained "
                            "Language Models, ACL 2023, arXiv:2111.00160")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, float]] = {"entries": 6, "alpha": 16.0, "threshold": 0.01}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(32.0, "numerator of the scale", alias=("lora_alpha",))
    entries: int = setting(64, "of each matrix that train beside it")
    mask: Literal["decomposed", "magnitude", "random"] = setting("decomposed", "which entries")
    iterations: int = setting(100, "growths of the decomposition at most", other=(1,))
    threshold: float = setting(0.01, "size above which an entry is none of low rank",
                               other=(0.1,))
    seed: int = setting(0, "of the draw", beside={"mask": "random"})

    def __post_init__(self) -> None:
        if self.entries < 1 or self.iterations < 1 or self.threshold <= 0:
            raise RecipeError("dsee: entries and iterations are at least 1, threshold is positive, "
                              f"got {self.entries}, {self.iterations} and {self.threshold}")
        for name, mask in (("iterations", "decomposed"), ("threshold", "decomposed"),
                           ("seed", "random")):
            if self.mask != mask and name in self.changed():
                raise RecipeError(f"dsee: {name} does nothing beside mask={self.mask!r}")

    def delta(self, site: Site) -> tuple[Chain, Few]:
        place = site.place
        place.check_rank(self.rank, "dsee")
        taken = masks.occupied(site)
        free = place.numel - (0 if taken is None else taken.numel())
        if self.entries > free:
            raise RankError(f"dsee: {self.entries} entries are asked for, and {place.name} has "
                            f"{free} that are free")
        portable = self.mask == "random" and taken is None
        if portable or not site.blank:
            index = self.chosen(site, taken)
        else:
            index = masks.to_come(place, self.entries)
        chain = Chain(place, self.rank, self.alpha / self.rank)
        few = Few(place, index.to(site.weight.device), portable)
        for p in (chain.A, chain.B, few.values):
            p.burnish_decay = False                      # type: ignore[attr-defined]
        return chain, few

    def chosen(self, site: Site, taken: Tensor | None) -> Tensor:
        """Positions of the entries."""
        if self.mask == "random":
            return masks.drawn(site.place.numel, self.entries, self.seed, site.place.name, taken)
        (left,) = decomposed(site, lambda W: [
            remainder(W, self.iterations, self.threshold) if self.mask == "decomposed" else W])
        return masks.largest(left.abs(), self.entries, taken)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp) + self.entries
