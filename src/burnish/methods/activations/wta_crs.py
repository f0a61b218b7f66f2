from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.tape.sampled import Sampled, Taken, nbytes, room
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class WtaCrs(Method):
    """WTA-CRS: of what a linear reads, some tokens are kept; its gradient is right in the mean.

    Outputs, loss and the gradients that go down are exact. A weight's ``dW = sum_n g_n x_n^T`` over
    N tokens is estimated from k of them, ``p_n = |x_n| / sum |x|``: the C likeliest as they are,
    k - C drawn from the rest in proportion to p and multiplied by ``(1 - P_C) / ((k - C) p_n)``.
    E[dW^] = dW; C minimises ``(1 - P_C) / (k - C)``, so the variance is never above that of plain
    sampling. ``k = max(floor, [retained N])``; k = N keeps the input as it is.

    Kept of an input: k rows, their numbers and factors, k (width b + 8) bytes for b of a number
    (k (8 width + 12) in fp64), once for all that read it. A ReLU in front of a linear keeps one
    bit a number, exactly. What is kept for another reader, or made again from what is, is not
    sampled: the lean tape makes inputs behind norms and activations so, exactly and for nothing,
    and in a block with fused attention that leaves none. It saves where inputs stand by
    themselves (eager attention, ReLU, plain chains), and with ``lean(on=False)`` where products
    may not be made twice: a pre-norm block that trains whole keeps 10 + 6 retained
    hidden-size units there. A run in which it had no input to keep says so, once.

    Draws come from a generator of their own, by the recipe's seed and the step. Joins
    `checkpoint` (rows live while a block is run again) and `offload` (they wait elsewhere).
    Somebody else's checkpointing keeps all; a model that is compiled runs uncompiled, and says so.

    Departures: draws are stratified (blocks/tape/sampled.py), and p is of the inputs alone. The
    paper multiplies by the gradient's norm at the sample's last visit, a table of samples x tokens
    for each layer that a data order must carry; where that is zero it does as here, but without the
    factors, so that it is biased. So where few tokens carry the gradient (the last block under a
    head that reads one token) the estimate here is right in the mean and poor. Products inside
    attention stay exact.
    """

    paper: ClassVar[str] = ("Winner-Take-All Column Row Sampling for Memory Efficient Adaptation "
                            "of Language Model (2023), arXiv:2305.15265")
    tier: ClassVar[str] = "checked against an independent equation"
    exact: ClassVar[bool] = False
    shown_beside: ClassVar[str] = "full + lean(on=False)"
    small: ClassVar[dict[str, float]] = {"retained": 0.9, "floor": 1}

    retained: float = setting(0.3, "share of the tokens that is kept of an input")
    floor: int = setting(10, "tokens that are kept at least")

    def __post_init__(self) -> None:
        if not 0 < self.retained <= 1 or self.floor < 1:
            raise RecipeError(f"wta_crs: retained is above 0 and at most 1, floor 1 or more, got "
                              f"retained={self.retained} and floor={self.floor}")

    def claims(self) -> tuple[str, ...]:
        return ("the form of kept tensors",)

    def activations(self, anatomy: Anatomy) -> WtaCrs:
        return self

    def install(self, attacher: Any, part: Method) -> None:
        attacher.state.tape.keep(Sampled(self.retained, self.floor, attacher.adapter.seed))

    def controller(self, tuned: Tuned) -> Taken:
        return Taken(tuned, self.name)

    def kept_bytes(self, tokens: int, width: int, itemsize: int) -> int:
        """What is kept of an input of so many tokens."""
        k = room(tokens, self.retained, self.floor)
        return min(nbytes(k, width, itemsize), tokens * width * itemsize)
