from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ....blocks.choose import masks
from ....blocks.choose.observe import Gradient
from ....blocks.weight.sparse import SparseDelta
from ....core.errors import RankError, RecipeError, nearest
from ....core.method import Method, setting
from ....core.site import Place, Site

#: masks that are made here; "stored" came from a file
KINDS = ("random", "magnitude", "structured", "gradient", "snip")


@dataclass(frozen=True, kw_only=True)
class Shira(Method):
    """SHiRA: one or two per cent of the entries as a switchable, high-rank adapter.

    ``W' = W + scatter(index, v)`` with k = rank (in + out) distinct entries per matrix, so the
    budget is that of LoRA at the same rank; ``dv_k = sum_n g[n, o_k] x[n, i_k]``.

    mask: "random" (drawn from `seed` by a portable permutation, so the file holds values only),
    "magnitude" (largest |W|), "structured" (whole rows and columns evenly spaced, and the
    diagonal), "gradient" (largest |dL/dW| over `samples` calibration samples), "snip" (largest
    |W dL/dW|, SNIP), or the path of a safetensors file of your own masks: one per target, under the
    weight's name in the model and in its shape, of truth values; k is then what the mask says.
    All but "random" write their index, 4 bytes an entry; a load reads it from there and needs
    neither data nor the masks' file.

    ``disjoint=True`` leaves out the entries that sparse updates on the same weight have already
    (other adapters', and those of parts before it), so that adapters add up without touching each
    other. In a merged model ``tuned.use("other")`` exchanges adapters by writing their entries.

    Start: v = 0: the pre-trained function exactly. Trains k per matrix. Kept for backward: x, or
    only the columns that hold entries when those are few. Merges exactly.
    """

    paper: ClassVar[str] = "Sparse High Rank Adapters (2024), arXiv:2406.13175"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(32, "sets the budget k = rank (in + out)", alias=("r",))
    mask: str = setting("random", "which entries: one of the kinds above, or a .safetensors file",
                        other=KINDS[1:])
    disjoint: bool = setting(False, "none that sparse updates there have already",
                             unseen="a fresh model has none: tests/methods/test_shira.py")
    seed: int = setting(0, "of the random mask")
    samples: int = setting(128, "samples to read for a mask that asks for gradients", other=(1,),
                           beside={"mask": "gradient"})

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"shira: samples={self.samples}: expected at least 1")
        if self.mask not in (*KINDS, "stored") and not self.given:
            raise RecipeError(f"shira(mask={self.mask!r}): expected one of {', '.join(KINDS)}, or "
                              f"a .safetensors file of masks{nearest(self.mask, KINDS)}")
        dead = {"rank": self.given, "seed": self.mask != "random",
                "samples": self.mask not in ("gradient", "snip")}
        if idle := [n for n, unread in dead.items() if unread and n in self.changed()]:
            raise RecipeError(f"shira: {idle[0]} does nothing beside mask={self.mask!r}")

    @property
    def given(self) -> bool:
        return self.mask.endswith(".safetensors")

    def finished(self) -> Shira:
        """Masks of a file stand in the adapter's own."""
        return replace(self, mask="stored") if self.given else self

    def observe(self, place: Place) -> Gradient | None:
        return Gradient(place.out, place.inp) if self.mask in ("gradient", "snip") else None

    def entries(self, place: Place, free: int, known: int | None) -> int:
        k = self.rank * (place.out + place.inp) if known is None else known
        if not 1 <= k <= free:
            raise RankError(f"shira: rank {self.rank} asks for {k} entries of {place.name}, "
                            f"which has {free}{' left' * self.disjoint}; the largest rank there is "
                            f"{free // (place.out + place.inp)}")
        return k

    def delta(self, site: Site) -> SparseDelta:
        taken = masks.occupied(site) if self.disjoint and not site.blank else None
        index = self._index(site, taken).to(site.weight.device)
        if self.given and taken is not None and (n := int(torch.isin(index, taken).sum())):
            raise RecipeError(f"shira: {n} entries of {site.place.name} in {self.mask} are those "
                              "of a sparse update there; disjoint=True takes masks without them")
        return SparseDelta(site.place, index, portable=self.mask == "random" and not self.disjoint,
                           counted=self.given or self.mask == "stored")

    def _index(self, site: Site, taken: Tensor | None) -> Tensor:
        place, weight, known = site.place, site.weight.detach(), site.settled.get("entries")
        if self.given and known is None:
            return masks.given(self.mask, site)
        n = place.out * place.inp
        k = self.entries(place, n if taken is None else n - taken.numel(), known)
        if self.mask == "stored" and known is None:
            raise RecipeError("shira(mask='stored') has the entries of a saved adapter; for a new "
                              "one name the masks' file")
        if self.mask == "random":
            return masks.drawn(n, k, self.seed, place.name, taken)
        if self.mask == "structured":
            return masks.structured(place.out, place.inp, k, taken)
        if site.blank and self.mask != "magnitude" or known is not None:
            return torch.arange(k)                   # a file brings it
        if self.mask == "magnitude":
            return masks.largest(weight.abs(), k, taken)
        g = site.seen.value.to(weight.device)
        return masks.largest(g.abs() if self.mask == "gradient" else (g * weight).abs(), k, taken)

    def per_token(self, place: Place) -> int:
        """Numbers kept per token besides the input (most empty columns: less than the input)."""
        return 0

    def count(self, place: Place, entries: int | None = None) -> int:
        """Trainable parameters on one matrix; entries: those of a mask that was given."""
        return self.entries(place, place.out * place.inp, entries)
