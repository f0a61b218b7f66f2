from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.weight.gleaned import Gleaned
from ....blocks.weight.start import decomposed
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Injected(Gleaned):
    """``W' = V - Q (K^T V) + s Q R``, (Q, K) of P: (P, relu P), or both its orthonormal basis."""

    def __init__(self, place: Place, rank: int, form: str, scale: float, inject: bool):
        super().__init__()
        self.P = nn.Parameter(torch.randn(place.out, rank) * 0.02)
        self.R = nn.Parameter(torch.zeros(rank, place.inp)) if inject else None
        self.form, self.scale = form, scale
        for p in self.parameters():
            p.burnish_decay = False

    def sides(self) -> tuple[Tensor, Tensor]:
        """Q and K, (out, r): ``Q K^T`` is what is taken out."""
        if self.form == "relu":
            return self.P, torch.relu(self.P)
        Q = torch.linalg.qr(self.P).Q
        return Q, Q

    @torch.no_grad()
    def begin(self, W: Tensor) -> None:
        """What is taken out is put in again."""
        if self.R is not None:
            self.R.copy_(self.sides()[1].t().to(W.dtype) @ W / self.scale)

    def factors(self, V: Tensor) -> tuple[Tensor, Tensor]:
        Q, K = self.sides()
        out = K.t().to(V.dtype) @ V
        return -out if self.R is None else self.R * self.scale - out, Q


@dataclass(frozen=True, kw_only=True)
class Deft(Method):
    """DEFT: a subspace of what a weight answers is taken out, and a matrix put in its place.

    ``W' = (I - Q K^T) W + s Q R``, P (out, rank), R (rank, in): ``form="relu"``, Q = P and K =
    relu(P), or ``form="qr"``, Q = K an orthonormal basis of P, so that ``I - Q Q^T`` is a
    projection. s = alpha / rank, or 1 without `alpha`. ``inject=False`` takes out alone (PaRa:
    ``W' = W - Q K^T W``, whose step 0 is not the pre-trained function).

    Start: P normal with std 0.02; R = K^T W / s, as PEFT begins: the pre-trained function exactly
    (the paper's R is drawn small instead, which loses the subspace at once). Trains rank
    (in + out) per matrix, rank out with inject=False. Kept for backward: x and rank numbers per
    token, as LoRA, with the factors beside them. K^T W is made once a forward and once more in
    backward, 3 rank in out products a step beside the tokens': 1.5 times LoRA's of that rank at n =
    out tokens, less with more. Merges exactly, exports as plain LoRA too. No weight decay.
    """

    paper: ClassVar[str] = ("DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models "
                            "(2025), arXiv:2509.22793")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "dimensions that are taken out", alias=("r",))
    form: Literal["relu", "qr"] = setting("relu", "how P says what is taken out",
                                          alias=("decomposition_method",))
    alpha: float | None = setting(None, "numerator of the scale of R; None: a scale of 1",
                                  other=(8.0,))
    inject: bool = setting(True, "put R in the place of what is taken out")

    def __post_init__(self) -> None:
        if self.alpha is not None and not self.alpha > 0:
            raise RecipeError(f"deft: alpha={self.alpha}: expected a number above 0")
        if self.alpha is not None and not self.inject:
            raise RecipeError("deft: alpha scales what is put in, and inject=False puts in nothing")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Injected:
        site.place.check_rank(self.rank, "deft")
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        term = Injected(site.place, self.rank, self.form, scale, self.inject)
        term.to(site.weight.device)
        if not site.blank:
            term.begin(*decomposed(site, lambda W: (W,)))
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def per_forward(self, place: Place) -> int:
        """Numbers kept of the matrix whatever the tokens: the inner factor, and Q where it is not
        P itself."""
        return self.rank * (place.inp + (place.out if self.form == "qr" else 0))

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + self.inject * place.inp)
