from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....blocks.weight.ternary import Ternary
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Site


@dataclass(frozen=True, kw_only=True)
class Twn(Method):
    """TWN: weights of three values on inputs in few bits, while they train.

        y = x^ W_t^T + b,   W_t = a (1[V > t] - 1[V < -t])
        t = 0.7 mean |V|,   a = mean of |V| where it is above t
        x^ = s round(x / s),   s = max |x| / (2^(input_bits-1) - 1) of a token

    V (out, in) is the weight and what is added to it: ``full + twn`` trains the weight (published),
    ``lora + twn`` a LoRA within the three values. t and a are those of an output (`share="row"`) or
    of the whole matrix; of a table that is targeted those of a token, whose entries alone are
    coded. W and x are clipped to +-`edge` first; gradients go straight through, and are zero where
    something was clipped. A constant of the method, as published for BERT: it does not train.

    Start: the coded model, not the pre-trained one. Trains nothing itself, so it saves nothing of
    what `full` holds; kept for backward are the codes of x, one byte a number, and a bit of where
    it was clipped; W_t is made again there. No merge: a plain module does not round what it reads.
    The head stays as it is. Beside `teacher_intervention` and distillation:

        full + twn + teacher_intervention + distill(temperature=1.0) + feature_distill
    """

    paper: ClassVar[str] = ("Ternary Weight Networks (2016), arXiv:1605.04711; TernaryBERT, EMNLP "
                            "2020, arXiv:2009.12812")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding"})
    shown_beside: ClassVar[str] = "lora(rank=4)"

    share: Literal["row", "matrix"] = setting("row", "one threshold and one value for all of a row "
                                                     "(of one output), or of the matrix")
    input_bits: int = setting(8, "of what a linear reads, 2 to 8", other=(2,))
    edge: float = setting(2.5, "where weights and inputs are clipped", other=(0.1,))

    def __post_init__(self) -> None:
        if not 2 <= self.input_bits <= 8 or not self.edge > 0:
            raise RecipeError(f"twn: input_bits of 2 to 8 and an edge above 0 are expected, got "
                              f"{self.input_bits} and {self.edge:g}")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Ternary | None:
        if site.place.role == "head":
            return None
        rows = 0 if site.place.kind == "embedding" else 1
        return Ternary(self.input_bits, self.edge, rows if self.share == "row" else None)
