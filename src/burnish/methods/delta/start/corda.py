from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ....blocks.choose.observe import Covariance
from ....blocks.weight.start import split
from ....core.errors import CheckError, RecipeError
from ....core.method import setting
from ....core.site import Place
from ._from import Starting


def damped(C: Tensor, start: float = 0.01, bound: float = 0.05) -> tuple[Tensor, Tensor]:
    """(C~, its inverse): ``C + damp mean(diag C) I``, damp doubled from `start` until
    ``||C~ C~^-1 - I||_F < bound``."""
    eye = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    level, damp = C.diagonal().mean(), start
    for _ in range(64):
        D = C + damp * level * eye
        inverse, info = torch.linalg.inv_ex(D)
        if not int(info) and float(torch.linalg.matrix_norm(D @ inverse - eye)) < bound:
            return D, inverse
        damp *= 2
    raise CheckError("corda: the covariance of the inputs has no inverse; they are zero, or hold "
                     "inf or nan")


def oriented(W: Tensor, C: Tensor, rank: int, smallest: bool, s: float) -> tuple[Tensor, Tensor]:
    """(A (rank, in), B (out, rank)) with ``s B A = U_J S_J V_J^T C~^-1`` from ``svd(W C~)``; J the
    `rank` smallest or largest singular values."""
    D, inverse = damped(C)
    U, S, Vt = torch.linalg.svd(W @ D, full_matrices=False)
    J = slice(S.numel() - rank, None) if smallest else slice(rank)
    return split(U[:, J], S[J], Vt[J] @ inverse, s)


@dataclass(frozen=True, kw_only=True)
class Corda(Starting):
    """CorDA: a low-rank update that starts from the weight as seen through a task's data.

    X (tokens, in): the inputs of a linear; ``C = (1/n) sum over samples of X^T X``, each sample
    divided by its largest absolute entry; ``C~ = C + damp mean(diag C) I``. With
    ``W C~ = U S V^T`` and r components J: ``B0 = U_J sqrt(S_J / s)``,
    ``A0 = sqrt(S_J / s) (V^T C~^-1)_J``; ``W' = W + s (B A - B0 A0)``, s = alpha / rank.
    ``mode="knowledge"``: J the smallest, C from text whose knowledge should stay;
    ``mode="instruction"``: J the largest, C from the fine-tuning data. damp starts at 0.01 and
    doubles until ``||C~ C~^-1 - I||_F < 0.05``.

    Reads data first: ``tune(..., calibration=batches)``, `samples` of them; padding does not
    count. C takes in^2 fp32 numbers, once for all matrices with the same input, a few layers at a
    time. (The authors' code divides by max(X), which explodes where inputs are negative.)

    Start: the pre-trained function up to rounding. Trains rank (in + out) per matrix; kept for
    backward as LoRA. Merges exactly; exports as plain LoRA of twice the rank. The file holds A0
    and B0, so a load needs no data. No weight decay.
    """

    paper: ClassVar[str] = ("CorDA: Context-Oriented Decomposition Adaptation of Large Language "
                            "Models (2024), arXiv:2406.05223")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    rank: int = setting(128, "components that train", alias=("r",))
    mode: Literal["knowledge", "instruction"] = setting(
        "instruction", "train the directions the data uses least, or most")
    samples: int = setting(256, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"corda reads data first: samples is at least 1, got {self.samples}")

    def observe(self, place: Place) -> Covariance:
        return Covariance(place.inp, scaled=True)

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, Tensor]:
        return oriented(W, seen.value.to(W), rank, self.mode == "knowledge", s)
