from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ....blocks.weight.normed import Normed
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Delora(Method):
    """DeLoRA: a sum of rank-one parts of length one, times a reach that trains.

    ``W' = W + lam / rank sum_i b_i a_i^T / (|b_i| |a_i|) diag(n)``: a_i rows of A (rank, in), b_i
    columns of B (out, rank); lam, one number per matrix, says how far, A and B say where. n (in,)
    is read off W once and stays: norm="column", the length of each of its columns (PEFT's and the
    authors' code: the update is at most lam |W|_F); "matrix", |W|_F everywhere (the paper's
    equation). Lengths count as 1e-4 at least.

    Start: A uniform in +-1/sqrt(in), B = 0, lam = `reach`: the pre-trained function exactly, since
    a length of nothing is 1e-4 (PEFT; the paper starts with B that is not zero and takes the frozen
    start off again, the same function at step 0 for twice the products; not built). Trains rank (in
    + out) + 1 per matrix. Kept for backward: x, rank per token. Merges exactly. No weight decay.
    Files hold n besides.
    """

    paper: ClassVar[str] = ("Decoupling Angles and Strength in Low-rank Adaptation (2025), "
                            "arXiv:2503.18225")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})
    small: ClassVar[dict[str, float]] = {"reach": 1.0}

    rank: int = setting(8, "rank-one parts", alias=("r",))
    reach: float = setting(15.0, "start of lam, the most that the parts can reach together",
                           alias=("delora_lambda",))
    norm: Literal["column", "matrix"] = setting("column", "lengths that the update is measured by")
    dropout: float = setting(0.0, "dropout on the input of A", alias=("module_dropout",))

    def __post_init__(self) -> None:
        check_dropout("delora", self.dropout)
        if not self.reach > 0:
            raise RecipeError(f"delora: reach={self.reach}: expected a number above 0")

    def delta(self, site: Site) -> Normed:
        place, W = site.place, site.weight
        place.check_rank(self.rank, "delora")
        wide = torch.promote_types(W.dtype, torch.float32)
        norms = torch.linalg.vector_norm(W.detach().to(wide), dim=0)
        if self.norm == "matrix":
            norms = torch.linalg.vector_norm(norms).expand_as(norms).clone()
        return Normed(place.out, self.rank, self.reach, norms, self.dropout)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp) + 1
