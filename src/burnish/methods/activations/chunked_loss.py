from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.tape.chunked import CHUNK
from ...blocks.tape.rows import Rows, Said
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.outputs import vocabulary_head

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class ChunkedLoss(Method):
    """Chunked vocabulary loss: the logits of a language model never exist whole.

    For labels y_n and logits ``z_n = head(x_n)``, N tokens that have a label, V words:

        loss = mean_n (log sum_v e^z_nv - z_n,y_n),    dx_n = W^T (softmax(z_n) - onehot(y_n)) / N

    `chunk` tokens at a time, value and gradient at once, so the products are those of the plain
    loss. Exact; sums and exponentials in fp32. A step holds beside the rest

        chunk V (4 bytes; 8 in fp64; 6 in half precision) while the loss is made, of x's size until
        backward, and where the head's weight trains its gradient from there on (fp32 or wider)

    where the plain loss holds 12 N V bytes and more. A soft cap takes chunk V numbers more.

    The head answers with logits that wait (blocks/tape/unmade.py): the model's own loss or yours
    takes them by chunks through ``F.cross_entropy``, after any shift, scale, soft cap, bias or
    cast; so do ``logsumexp`` and ``argmax``. Whatever else reads them (a metric, another loss,
    generation) gets them whole; a run whose loss does is told, once. Tokens without a label are
    left out. A compiled model runs uncompiled, and says so. Inside ``torch.func`` and somebody
    else's checkpointing logits are whole. What adds to hidden states at the head, drops there, or
    reads keys of the batch there is refused.

    The default of language models under ``burnish.fit`` and ``burnish.plan``;
    ``chunked_loss(on=False)`` leaves it out.
    """

    paper: ClassVar[str] = ("the gradient in forward: Liger Kernel (2024), arXiv:2410.10989; "
                            "blocks/tape/chunked.py")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"vocabulary"})

    chunk: int = setting(CHUNK, "tokens whose logits exist at once", other=(1,))
    on: bool = setting(True, "False makes all logits")

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise RecipeError(f"chunked_loss(chunk={self.chunk}): 1 token or more")

    def claims(self) -> tuple[str, ...]:
        return ("the logits of the loss",)

    def activations(self, anatomy: Anatomy) -> ChunkedLoss | None:
        return self if self.on else None

    def install(self, attacher: Any, part: Method) -> None:
        path = vocabulary_head(attacher.anatomy)
        if path is None:
            raise RecipeError("chunked_loss needs a linear head over a vocabulary, which "
                              f"{type(attacher.model).__name__} does not have")
        slot = attacher.slot(path)
        if why := slot.together():
            raise RecipeError(f"chunked_loss takes the rows of {path} in chunks, and {why}")
        attacher.state.tape.beside = "the loss takes the head's logits in chunks"
        Rows(attacher.state, attacher.adapter.name, slot, self.chunk).listen(slot, part.name)

    def controller(self, tuned: Tuned) -> Said | None:
        return Said(tuned.model, self.name) if self.on else None
