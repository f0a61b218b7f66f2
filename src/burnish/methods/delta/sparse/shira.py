from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ....blocks.choose.observe import Gradient
from ....blocks.weight.sparse import SparseDelta, spread
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Shira(Method):
    """SHiRA: one or two per cent of the entries as a switchable, high-rank adapter.

    ``W' = W + scatter(index, v)`` with k = rank (in + out) distinct entries per matrix, so the
    budget is that of LoRA at the same rank; ``dv_k = sum_n g[n, o_k] x[n, i_k]``.

    mask: "random" (drawn from `seed` by a portable permutation, so the file holds values only),
    "magnitude" (largest |W|), "structured" (whole rows and columns evenly spaced, and the
    diagonal), "gradient" (largest |dL/dW| over `samples` calibration samples), "snip" (largest
    |W dL/dW|, SNIP). All but the first write their index, 4 bytes an entry; a load reads it from
    there and needs no data.

    Start: v = 0: the pre-trained function exactly. Trains k per matrix. Kept for backward: x, or
    only the columns that hold entries when those are few. Merges exactly.
    """

    paper: ClassVar[str] = "Sparse High Rank Adapters (2024), arXiv:2406.13175"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(32, "sets the budget k = rank (in + out)", alias=("r",))
    mask: Literal["random", "magnitude", "structured", "gradient", "snip"] = setting(
        "random", "which entries")
    seed: int = setting(0, "of the random mask")
    samples: int = setting(128, "samples to read for a mask that asks for gradients", other=(1,),
                           beside={"mask": "gradient"})

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"shira: samples={self.samples}: expected at least 1")

    def observe(self, place: Place) -> Gradient | None:
        return Gradient(place.out, place.inp) if self.mask in ("gradient", "snip") else None

    def entries(self, place: Place) -> int:
        k = self.rank * (place.out + place.inp)
        if not 1 <= k <= place.out * place.inp:
            raise RankError(f"shira: rank {self.rank} asks for {k} entries of {place.name}, "
                            f"which has {place.out * place.inp}; the largest rank there is "
                            f"{place.out * place.inp // (place.out + place.inp)}")
        return k

    def delta(self, site: Site) -> SparseDelta:
        place, weight = site.place, site.weight
        k, n = self.entries(place), place.out * place.inp
        if self.mask == "random":
            index = _same_everywhere(n, k, self.seed, place.name).to(weight.device)
        elif self.mask == "magnitude":
            index = weight.detach().abs().flatten().topk(k).indices
        elif self.mask == "structured":
            index = _structured(place, k).to(weight.device)
        elif site.blank:                         # a file brings it
            index = torch.arange(k, device=weight.device)
        else:
            g = site.seen.value.to(weight.device)
            score = g.abs() if self.mask == "gradient" else (g * weight.detach()).abs()
            index = score.flatten().topk(k).indices
        return SparseDelta(place, index, portable=self.mask == "random")

    def per_token(self, place: Place) -> int:
        """Numbers kept per token besides the input (whose empty columns are left out where most
        are)."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.entries(place)


def _same_everywhere(n: int, k: int, seed: int, key: str) -> Tensor:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():              # an index has values, also in a simulation
        index = spread(n, k, seed, key)
    return index + torch.zeros((), dtype=torch.int64)


def _structured(place: Place, k: int) -> Tensor:
    """Diagonal first, then alternately a row and a column, evenly spaced, until k entries."""
    taken = torch.zeros(place.out, place.inp, dtype=torch.bool)
    taken.diagonal()[:] = True
    left = k - min(place.out, place.inp)
    for step in range(4 * (place.out + place.inp)):
        golden = (step // 2 * 0.6180339887498949) % 1.0
        line = taken[:, int(golden * place.inp)] if step % 2 else taken[int(golden * place.out)]
        left -= _fill(line, left)
        if not left:
            break
    _fill(taken.view(-1), left)                  # nearly every entry is asked for
    return taken.view(-1).nonzero().squeeze(1)


def _fill(line: Tensor, most: int) -> int:
    """Take the free entries of a line, at most so many; how many they were."""
    free = (~line).nonzero().squeeze(1)[:most]
    line[free] = True
    return free.numel()
