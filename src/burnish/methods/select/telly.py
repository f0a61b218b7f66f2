from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.asked import chosen
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Telly(Method):
    """Telly-k: full fine-tuning of all but the bottom of the model.

    The embeddings and the first k blocks (`freeze`) stay as they are, every parameter of the
    blocks above trains, and so does the head (``head="auto"``). Blocks count in the order of the
    model: those of several stages, or of an encoder and its decoder, through all of them.

    Start: the pre-trained function. Trains (L - k) times the parameters of a block. Backward ends
    at block k: nothing below it is kept, and its dropout goes on in training, as in the paper.
    What stands between or behind the blocks without being one (a last norm) stays as it is. A head
    that is tied to the embeddings stays with them; ``head=True`` trains both, and backward goes to
    the bottom for it.
    `targets` narrows it to some tensors of the blocks that train.
    """

    paper: ClassVar[str] = "Towards Efficient Fine-tuning of Pre-trained Code Models, ISSTA 2023"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    small: ClassVar[dict[str, int]] = {"freeze": 1}

    freeze: int = setting(6, "blocks, from the first, that stay as they are")

    def __post_init__(self) -> None:
        if self.freeze < 0:
            raise RecipeError(f"telly: freeze={self.freeze}: expected a number of blocks, 0 or "
                              "more")

    def repeats(self) -> int | None:
        """Which blocks train depends on their place."""
        return None

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        above = anatomy.blocks[self.freeze:]
        if not above:
            raise RecipeError(f"telly: freeze={self.freeze} leaves none of the "
                              f"{len(anatomy.blocks)} blocks of this model to train; the largest "
                              f"number that leaves one is {len(anatomy.blocks) - 1}")
        names = [f"{block.path}.{leaf}" for block in above
                 for leaf, _ in anatomy.model.get_submodule(block.path).named_parameters()]
        for name in chosen(anatomy, self, names, siblings=False):
            yield Selection(name)
