from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ....blocks.choose.budget import cubic
from ....blocks.weight.masked import most, straight
from ....blocks.weight.term import Wrap
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


class Pruned(Wrap):
    """``W' = M * (V + scale U Z)``; share: of the entries that M leaves out, a controller's."""

    def __init__(self, place: Place, method: Pst):
        super().__init__()
        r, q = method.rank, method.score_rank
        self.U, self.Z = nn.Parameter(torch.randn(place.out, r)), _zeros(r, place.inp)
        self.A, self.B = nn.Parameter(torch.randn(place.out, q)), _zeros(q, place.inp)
        self.R, self.C = _zeros(place.out), _zeros(place.inp)
        self.scale, self.alpha, self.lines = method.scale, method.alpha, method.lines
        self.share = 0.0

    # what is pruned is part of the adapter
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.share], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.share = float(state[0])

    def of(self, V: Tensor) -> Tensor:
        wide = torch.promote_types(V.dtype, self.U.dtype)
        U, Z, A, B, R, C = (p.to(wide) for p in self.theta())
        W = torch.addmm(V.to(wide), U, Z, alpha=self.scale)
        S = torch.addmm(W.abs(), A, B, alpha=self.alpha)
        S = S + self.lines * (R.unsqueeze(1) + C)
        M = most(S.detach(), W.numel() - round(self.share * W.numel()))
        return straight(W, S, M).to(V.dtype)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


@dataclass(frozen=True, kw_only=True)
class Pst(Method):
    """PST: a weight is pruned while it is tuned; both its update and its scores are of low rank.

    ``W~ = W + scale U Z``,  ``S = |W~| + alpha A B + lines (R 1^T + 1 C^T)``,  ``W' = M * W~``

    M keeps the (1 - v) in out largest scores of each matrix, exactly (of equal ones the first).
    U (out, rank), Z (rank, in), A (out, score_rank), B (score_rank, in), R (out,), C (in,). With
    G = dL/dW' the mask passes the gradient straight through: ``dS = G * W~``,
    ``dW~ = M * G + sign(W~) * dS``. v rises from 0 to `ratio` as a cubic between `warmup` and
    1 - `cooldown` of the run; M is chosen anew in every forward.

    Start: U, A ~ N(0, 1), the others 0, v = 0: the pre-trained function exactly. Trains
    (rank + score_rank + 1)(in + out) per matrix: 2.6 % of BERT-base (the 1.5 % that the paper
    prints take other settings, unconfirmed). Kept for backward: x; W~, S and M are made again
    there, matrix by matrix, and the choice with them (a byte an entry would have to wait for it).
    Merges exactly, to a matrix with that share of zeros, which the next forward would choose.
    Wraps the other terms on its weight: what they add is pruned, too. Biases stay. Without the
    number of steps (``tuned.total_steps``) nothing is pruned.

    Our reading: `ratio`, `warmup` and `cooldown`, which the text does not give.
    """

    paper: ClassVar[str] = ("Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, "
                            "IJCAI 2022, arXiv:2205.11005")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "rank of the update", alias=("r", "weight_rank"))
    score_rank: int = setting(8, "rank of the scores", alias=("mask_rank",))
    ratio: float = setting(0.9, "share of each matrix that is pruned in the end")
    scale: float = setting(1.0, "of the update", alias=("beta",))
    alpha: float = setting(1.0, "weight of A B in the scores", alias=("alpha1",), least=0.0)
    lines: float = setting(1.0, "weight of rows and columns in the scores", alias=("alpha2",))
    warmup: float = setting(0.1, "share of the run before pruning begins")
    cooldown: float = setting(0.1, "share of the run after the last rise of v")

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or not all((self.scale, self.alpha, self.lines)):
            raise RecipeError(f"pst: ratio is a share in (0, 1), got {self.ratio}; scale, alpha "
                              "and lines are not 0")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown > 1:
            raise RecipeError("pst: warmup and cooldown are shares of the run, together at most 1")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Pruned:
        site.place.check_rank(self.rank, "pst")
        site.place.check_rank(self.score_rank, "pst")
        return Pruned(site.place, self)

    def controller(self, tuned: Tuned) -> Rise:
        return Rise(self, dict(tuned.terms(Pruned)))

    def share(self, step: int, total: int) -> float:
        """v(t)."""
        return cubic(0.0, self.ratio, step, self.warmup * total, (1 - self.cooldown) * total)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return (self.rank + self.score_rank + 1) * (place.out + place.inp)


class Rise:
    """v on its way to the target."""

    def __init__(self, method: Pst, terms: Mapping[str, Pruned]):
        self.method, self.terms = method, terms
        self.total: int | None = None

    def start(self, total: int | None) -> None:
        self.total = total

    def step_begin(self, step: int) -> None:
        if self.total is not None:
            self.prune(self.method.share(step, self.total))

    def rehearse(self, step: int) -> None:
        self.prune(self.method.ratio)

    def prune(self, share: float) -> None:
        for term in self.terms.values():
            term.share = share

    def state_dict(self) -> Mapping[str, Any]:
        return {"total": self.total, "share": max(t.share for t in self.terms.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]
        self.prune(state["share"])
