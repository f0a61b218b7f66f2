from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....blocks.weight.joint import Joint, basis, entries, off_diagonal
from ....core.errors import CheckError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


def kind_of(path: str) -> str:
    """What a matrix is called in its block, which those of other blocks share: its last two names,
    or one behind a number; BERT's attention ends in an "output.dense" as its MLP does."""
    parts = path.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else "_".join(parts[-2:])


def kinds_of(places: Sequence[Place]) -> dict[Place, str]:
    """place -> its kind, which is all of one name with one number of inputs."""
    first: dict[str, int] = {}
    out = {}
    for p in places:
        name = f"{kind_of(p.path)}_{p.role}" if p.rows else kind_of(p.path)
        same = first.setdefault(name, p.inp) == p.inp
        out[p] = name if same else f"{name}_{p.inp}"
    return out


@dataclass(frozen=True, kw_only=True)
class Frod(Method):
    """FRoD: the weights of one kind share a full basis, in which each is scaled and turned a bit.

    ``W_l = U_l diag(lambda_l) V^T``; ``W_l' = U_l (diag(z_l) + S_l) V^T``. V (in, in) is one for
    all q_proj, say, of the model: ``[W_1; W_2; ..] = Q R``, ``V = R^T E``, E the eigenvectors of
    ``mean_l (Q_l^T Q_l + ridge I)^-1``; where all rows together are fewer than the inputs, their
    right singular vectors. The columns of U_l (out, in) have length 1. z_l (in,) trains from
    lambda_l, S_l from 0 at a share `density` of its entries beside the diagonal, the same places
    for a kind, drawn from `seed`.

    Start: the pre-trained function exactly. Trains in + max(1, density in^2) per matrix. Kept for
    backward: V^T x, in numbers per token, not x. Merges exactly. Frozen beside each matrix is U_l,
    as large as the matrix, and V per kind; both are in the file, since no two machines decompose
    alike. No weight decay, which would pull z to nothing.

    A kind is the last two names of a matrix (one behind a number). What is trained is W' - W, so
    that W keeps what rounding would take of it; PEFT computes W' alone.
    """

    paper: ClassVar[str] = ("FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (2026), "
                            "doi:10.1609/aaai.v40i31.39813")
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    density: float = setting(0.01, "share of the entries of S that train", alias=("sparse_rate",),
                             other=(0.1,))
    ridge: float = setting(1e-3, "added to what is inverted for the basis",
                           alias=("regularization_alpha",), other=(10.0,))
    dropout: float = setting(0.0, "dropout on the input", alias=("frod_dropout",))
    seed: int = setting(0, "of the places in S", alias=("projection_prng_key",))

    def __post_init__(self) -> None:
        check_dropout("frod", self.dropout)
        if not 0 < self.density <= 1:
            raise RecipeError(f"frod: density={self.density}: expected a share above 0, at most 1")
        if self.ridge <= 0:
            raise RecipeError(f"frod: ridge={self.ridge}: expected a number above 0")

    def repeats(self) -> int | None:
        return None                              # the basis is of all blocks

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        out: dict[str, Tensor] = {}
        g = torch.Generator().manual_seed(self.seed)
        for name, n in sorted({(name, p.inp) for p, name in kinds_of(places).items()}):
            out[f"V_{name}"] = torch.zeros(n, n)
            out[f"index_{name}"] = off_diagonal(n, self.density, g)
        return out

    def delta(self, site: Site) -> Joint:
        place, kinds = site.place, kinds_of(site.places)
        term = Joint(place.out, place.inp, entries(place.inp, self.density), site.shared,
                     kinds[place])
        term.dropout = self.dropout
        if site.blank:
            return term
        mine = [p for p in site.places if kinds[p] == kinds[place]]
        try:
            if mine[0] == place:
                term.V.copy_(basis([self._weight(site, p) for p in mine], self.ridge))
            term.read(site.weight)
        except torch.linalg.LinAlgError as e:
            raise CheckError(f"frod: no basis for {place.name}: {str(e).splitlines()[0]}") from e
        if not bool(term.L.isfinite().all()):
            raise CheckError(f"frod: the basis for {place.name} is not finite: a weight holds inf "
                             "or nan")
        return term

    @staticmethod
    def _weight(site: Site, place: Place) -> Tensor:
        with site.weight_of(place) as W:         # on the host, as PEFT has it: both find one V
            return W.to("cpu", torch.float32, copy=True)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return place.inp

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return place.inp + entries(place.inp, self.density)
