from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.hadamard import Hadamard
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Loha(Method):
    """LoHa: the entrywise product of two products of low rank (FedPara).

    ``W' = W + s (B1 A1) * (B2 A2)``, entry by entry, s = alpha / rank, B_i (out, rank), A_i
    (rank, in): a rank of up to rank^2 for the parameters of two LoRAs. Convolutions: the kernel is
    flattened into `in`; `tucker` gives each A_i a core of its own, ``A_i = T_i V_i``, T_i (rank,
    rank, k), V_i (rank, channels).

    Start: A1, A2 ~ N(0, 1), B1 ~ N(0, 0.1^2), B2 = 0, with `tucker` T_i ~ N(0, 0.1^2) and V_i ~
    N(0, 1), as LyCORIS has it: the pre-trained function exactly. Trains 2 rank (in + out) per
    matrix, 2 rank (out + rank k + channels) with `tucker`. Kept for backward: x; both products are
    made again, panel by panel. Merges exactly. No weight decay. In training `rank_dropout` leaves
    outputs out of a forward, each with that probability, and the others are scaled by what is left;
    `module_dropout` leaves a matrix out of one, unscaled (both as PEFT has them: blocks/weight/
    dropped.py).
    """

    paper: ClassVar[str] = ("FedPara: Low-Rank Hadamard Product for Communication-Efficient "
                            "Federated Learning (2021), arXiv:2108.06098; LyCORIS (2023), "
                            "arXiv:2309.14859")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "rank of either product", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    tucker: bool = setting(
        False, "kernels by a core of their own",
        alias=("use_effective_conv2d", "use_effective_conv", "use_tucker"),
        unseen="no kernel is among the default targets: tests/methods/test_loha.py")

    rank_dropout: float = setting(0.0, "probability that an output gets no update in a forward")
    module_dropout: float = setting(0.0, "probability that a matrix gets none in a forward")

    def __post_init__(self) -> None:
        check_dropout("loha", self.rank_dropout, "rank_dropout")
        check_dropout("loha", self.module_dropout, "module_dropout")
        if self.rank < 1:
            raise RecipeError(f"loha: rank={self.rank}: expected at least 1")

    def delta(self, site: Site) -> Hadamard:
        place = site.place
        place.check_rank(self.rank, "loha")
        term = Hadamard(place.out, place.inp, self.rank, self.alpha / self.rank, place.kernel,
                        self.tucker)
        term.rank_dropout, term.rescale = self.rank_dropout, True
        term.module_dropout = self.module_dropout
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        right = self.rank * place.kernel + place.inp // place.kernel \
            if self.tucker and place.kernel > 1 else place.inp
        return 2 * self.rank * (place.out + right)
