from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Lean(Method):
    """Lean tape: do not keep what can be made again exactly from what is kept anyway.

    Outputs of norms and activations, products and widening casts are noted instead of kept, one
    input is kept once for all its readers, dropout keeps a generator state instead of a mask.
    Gradients are exact: backward runs the same operation on the same numbers. A pre-norm block
    with LoRA on all linears keeps 10 hidden-size units instead of 16.

    level: products are made again, too, for less memory and more time. Such a product runs once
    more in backward, on the same numbers, and nothing else does (``checkpoint`` runs whole blocks):

        1   none
        2   results of linears that an activation or a gate reads: a pre-norm block keeps 6 units
            for products of 4 d^2 more per token (half of its MLP's; of SwiGLU's two in three)
        3   results of linears that anything reads (q, k and v without rotary embeddings as well):
            3 units, for 7 d^2

    On by default; ``lean(on=False)`` switches it off (to compare). Under ``torch.compile`` the
    compiler's own partitioner decides what is kept.

    Raises RecipeError for another level, and for a level beside on=False.
    """

    paper: ClassVar[str] = "burnish; see blocks/tape/saved.py"
    excused: ClassVar[dict[str, str]] = {
        "beside_a_partner_it_acts on mlp":
            "a ReLU keeps its output, which the next linear reads: there is nothing to leave out"}

    on: bool = setting(True, "False keeps what autograd keeps")
    level: Literal[1, 2, 3] = setting(1, "which products of linears are made again: none, those "
                                         "that activations read, all")

    def __post_init__(self) -> None:
        if self.level not in (1, 2, 3):
            raise RecipeError(f"lean: level is 1, 2 or 3, not {self.level!r}")
        if not self.on and self.level != 1:
            raise RecipeError("lean: on=False keeps everything, so a level has nothing to act on; "
                              "leave one of them out")

    def claims(self) -> tuple[str, ...]:
        return ("the lean tape",)

    def activations(self, anatomy: Anatomy) -> LeanSwitch:
        return LeanSwitch(self.on, self.level)


@dataclass(frozen=True)
class LeanSwitch:
    on: bool
    level: int

    def install(self, attacher: Any, part: Method) -> None:
        tape = attacher.state.tape
        tape.lean, tape.level = self.on, self.level
