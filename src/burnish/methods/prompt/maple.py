from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...blocks.state.generators import Projected
from ...blocks.state.placed import Placed
from ...blocks.state.prompts import Tokens
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, towers
from ._stacks import states_as_they_were
from .coop import start_rows

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Maple(Method):
    """MaPLe: prompts in the first blocks of a text tower, and in a picture tower what is made of
    them.

    In block i of the first J = `layers` the text's tokens behind the first are P_i (length, d_t),
    whatever the block before made of them; in the first block they stand in the place of as many
    placeholders, before positions are added. The pictures' tokens are followed by ``P_i W_i^T +
    b_i`` (length, d_v), fresh in each of these blocks, carried on behind them and left out at the
    end. Texts keep their length, and so their end.

    With ``coupled=False`` the pictures' rows are their own. A finished file (``tuned.save``) holds
    the rows of both sides, as of that; a checkpoint of a run holds P_i, W_i and b_i.

    Start: P_1 the embeddings of `ids` (of "a photo of a"), all else N(0, 0.02^2), W_i as linears
    start: never the pre-trained function. Trains J (length d_t + d_t d_v + d_v), 3,555,072 on CLIP
    ViT-B/16, or J length (d_t + d_v). Kept for backward: both towers', for length more tokens of a
    picture. Not mergeable.

    The authors: SGD at 3.5e-3, batches of 4, 5 epochs, 16 pictures a class.
    """

    paper: ClassVar[str] = "MaPLe: Multi-modal Prompt Learning (2023), arXiv:2210.03117"
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"two towers"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"layers": 2}

    length: int = setting(2, "rows per block", alias=("n_ctx",))
    layers: int = setting(9, "how many of the first blocks", alias=("prompt_depth",), other=(1,))
    ids: tuple[int, ...] | list[int] | None = setting(
        None, "token ids whose embeddings start the first rows", other=((3, 4),))
    coupled: bool = setting(True, "rows of pictures are made of those of texts")

    def __post_init__(self) -> None:
        if min(self.length, self.layers) < 1:
            raise RecipeError(f"maple(length={self.length}, layers={self.layers}): expected at "
                              "least one row and one block")

    def repeats(self) -> int | None:
        return None

    def prompt(self, anatomy: Anatomy) -> Maple:
        check_layers(self, anatomy)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        table = attacher.model.get_submodule(towers(attacher.anatomy).table)
        n, d = self.length, table.embedding_dim
        rows = [torch.randn(n, d) * 0.02 for _ in range(self.layers)]
        if self.ids is not None:
            rows[0] = start_rows(self, table.weight, n)
        stand_in_both(attacher, part, rows, self.coupled)

    def finished(self) -> Maple:
        return replace(self, coupled=False)

    def count(self, d: int, out: int) -> int:
        """Trainable parameters at text width d, pictures of width `out`."""
        made = d * out + out if self.coupled else self.length * out
        return self.layers * (self.length * d + made)


def stand_in_both(attacher: Any, part: Method, rows: list[torch.Tensor], coupled: bool,
                  share: bool = False) -> None:
    """Rows (L, d_t) in the first blocks of the text tower, and in those of the pictures' what a
    linear makes of them (``share=True``: one for all blocks), or N(0, 0.02^2) of their own."""
    two, state, name = towers(attacher.anatomy), attacher.state, attacher.adapter.name
    n, d = rows[0].shape
    out, linear = two.vision[0].hidden_size, None
    for i, block in enumerate(two.vision):
        maker = own = None
        if i < len(rows):
            path = two.text[i].path if i else two.table
            text = Placed(state, name, rows[i], entering=i > 0).to(attacher.device(path))
            text.listen(attacher.slot(path), part.name)
            maker = Projected(text, d, out, linear) if coupled else None
            linear = maker.linear if share and maker is not None else None
            own = None if coupled else torch.randn(n, out) * 0.02
        Tokens(state, name, n, own, after=None, enter=i == 0, leave=i + 1 == len(two.vision),
               maker=maker).to(attacher.device(block.path)).listen(
                   attacher.slot(block.path), part.name)
    states_as_they_were(attacher, part, two.vision[0].stack, n, None)


def check_layers(method: Any, anatomy: Anatomy) -> None:
    """RecipeError where a method of both towers has no place, or asks for more blocks than are."""
    if method.targets is not None:
        raise RecipeError(f"{method.name} takes no targets: it stands in the first blocks; say how "
                          "many with layers")
    two = towers(anatomy)
    if two is None:
        refuse(method, anatomy)
    if method.layers > (most := min(len(two.text), len(two.vision))):
        raise RecipeError(f"{method.name}(layers={method.layers}): the towers have "
                          f"{len(two.text)} and {len(two.vision)} blocks; at most {most}")
