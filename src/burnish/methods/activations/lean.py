from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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

    On by default; ``lean(on=False)`` switches it off (to compare). Under ``torch.compile`` the
    compiler's own partitioner decides what is kept.
    """

    paper: ClassVar[str] = "burnish; see blocks/tape/saved.py"

    on: bool = setting(True, "False keeps what autograd keeps")

    def claims(self) -> tuple[str, ...]:
        return ("the lean tape",)

    def activations(self, anatomy: Anatomy) -> LeanSwitch:
        return LeanSwitch(self.on)


@dataclass(frozen=True)
class LeanSwitch:
    on: bool

    def install(self, attacher: Any, part: Method) -> None:
        attacher.state.tape.lean = self.on
