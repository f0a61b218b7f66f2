from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.bottleneck import activation
from ...blocks.state.remapped import Remapped
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import head_linear, refuse
from ...core.site import Branch

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Nmtune(Method):
    """NMTune: features of a model that was pre-trained on noisy labels are remapped for its head.

        Z = W2 act(W1 F + b1) + b2        F (D) what the head reads, W1 (hidden, D)
        loss + weight (mean_n ||F_n / ||F_n|| - Z_n / ||Z_n||||^2 + (1 / D) sum_{i != j} C(Z)_ij^2
                       - s_1(Z) / sum_j s_j(Z))

    C the covariance of Z's channels over the batch (over n - 1), s its singular values
    (blocks/state/remapped.py). The head answers Z. The first term keeps what pre-training knows,
    the others undo what noise does to it: too little in the leading direction, channels that say
    the same. Of a head that reads every token, tokens that the attention mask leaves out do not
    count.

    The encoder is a fixed function, in evaluation mode and without a graph, so cached features do.
    Trains 2 D hidden + hidden + D, and the head beside it. Start: torch's of a linear, not the
    pre-trained function. Kept for backward: F, the hidden state and Z. Not mergeable.

    Readings: the first term is a mean over samples of a sum over channels, hidden = D (both
    unconfirmed).
    """

    paper: ClassVar[str] = ("Understanding and Mitigating the Label Noise in Pre-training on "
                            "Downstream Tasks (2023), arXiv:2309.17002")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"linear head"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    hidden: int | None = setting(None, "width of the MLP; None: that of the features", other=(5,))
    act: str = setting("relu", "activation inside", other=("gelu",))
    weight: float = setting(0.01, "lambda, of the three terms; 0: the MLP alone", other=(10.0,))

    def __post_init__(self) -> None:
        activation(self.act)
        if self.hidden is not None and self.hidden < 1:
            raise RecipeError(f"nmtune: hidden is at least 1, got {self.hidden}")
        if not 0 <= self.weight < float("inf"):
            raise RecipeError(f"nmtune: weight is 0 or above, got {self.weight}")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        head = head_linear(anatomy)
        if head is None:
            refuse(self, anatomy)
        made = Remapped(head.inp, self.hidden or head.inp, self.act, self.weight)
        yield Branch(head.path, made, compose="replace", at="input")

    def objective(self, tuned: Tuned, run: Any) -> Iterable[Any]:
        return ()                                # its term rides where the features pass

    def count(self, d: int) -> int:
        """Trainable numbers before a head that reads d features, without the head."""
        return Remapped.count(d, self.hidden or d)
