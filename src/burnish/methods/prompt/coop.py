from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.placed import Image, Meta, PerImage, Placed
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, towers, unmet

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Coop(Method):
    """CoOp: a learned context before the names of classes; CoCoOp: one that follows the image.

    A text ``[SOS][v_1]..[v_M][class].[EOS]`` brings M = `length` placeholders behind its first
    token, in whose place v (M, d) stands, before positions are added. Its length and its end (read
    off its ids) stay as they are. The model's own logits are ``s cos(f(x), g(t_c))``. With
    ``classes=C`` each of C texts, given in one order, has a context of its own.

    CoCoOp (``hidden=32``): ``v_m(x) = v_m + W_2 relu(W_1 x + b_1) + b_2``, x the image's normalised
    features (p); every image reads texts of its own, I C of them for I images, and
    ``logits_per_image`` is of these.

    Start: v N(0, 0.02^2), or the embeddings of `ids` (of "a photo of a": then step 0 of CoOp is
    that hand-made prompt). Not the pre-trained function on other placeholders. Trains M d (C
    times), and hidden (p + d) + hidden + d with `hidden`: 8,192 with 16 rows of CLIP's 512, 35,360
    in CoCoOp with 4. Kept for backward: the text tower's, C texts (I C with `hidden`): checkpoint
    beside it where they are many; nothing of the images, whose features never change and may be
    made once. Not mergeable; of CoOp the C text features (``model.get_text_features``) are all
    that an answer needs.

    The authors: SGD at 2e-3, cosine, one epoch at 1e-5 first.
    """

    paper: ClassVar[str] = ("Learning to Prompt for Vision-Language Models (2022), "
                            "arXiv:2109.01134; Conditional Prompt Learning for Vision-Language "
                            "Models (2022), arXiv:2203.05557")
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"two towers"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    length: int = setting(16, "rows of the context", alias=("n_ctx",))
    ids: tuple[int, ...] | list[int] | None = setting(
        None, "token ids whose embeddings start the context", other=((3, 4),))
    classes: int = setting(0, "how many classes have a context of their own; 0: one for all",
                           other=(2,))
    hidden: int = setting(0, "width of the MLP that follows the image; 0: the context does not",
                          other=(4,))

    def __post_init__(self) -> None:
        if self.length < 1 or min(self.classes, self.hidden) < 0:
            raise RecipeError(f"coop(length={self.length}, classes={self.classes}, hidden="
                              f"{self.hidden}): expected at least one row, 0 classes or more and a "
                              "width of 0 or more")

    def prompt(self, anatomy: Anatomy) -> Coop:
        if self.targets is not None:
            raise RecipeError("coop takes no targets: it stands before the names of classes")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        two, state, name = towers(attacher.anatomy), attacher.state, attacher.adapter.name
        table = attacher.model.get_submodule(two.table)
        meta = Meta(two.joint, self.hidden, table.embedding_dim) if self.hidden else None
        made = Placed(state, name, self.start(table.weight), meta=meta)
        made.to(attacher.device(two.table)).listen(attacher.slot(two.table), part.name)
        if meta is not None:
            Image(state, name).listen(attacher.slot(two.image), f"{part.name}_image")
            PerImage(state, name).listen(attacher.slot(""), f"{part.name}_pairs")

    def start(self, table: Tensor) -> Tensor:
        """v from the table of embeddings."""
        many = (self.classes,) * (self.classes > 0)
        return start_rows(self, table, self.length).repeat(*many, 1, 1) if self.ids is not None \
            else torch.randn(*many, self.length, table.shape[1], device=table.device) * 0.02

    def count(self, d: int, p: int | None = None) -> int:
        """Trainable parameters at text width d, with images and texts meeting in p (None: d)."""
        meta = self.hidden * ((p or d) + d) + self.hidden + d if self.hidden else 0
        return max(1, self.classes) * self.length * d + meta


def start_rows(method: Any, table: Tensor, length: int) -> Tensor:
    """The embeddings of the method's `ids`, repeated to `length`. RecipeError for ids that name no
    token, or are more than that."""
    ids = list(method.ids)
    if len(ids) > length:
        raise RecipeError(f"{method.name}(ids=...): {len(ids)} tokens are more than the {length} "
                          "rows (length) that start from them")
    if not ids or not 0 <= min(ids) <= max(ids) < len(table):
        raise RecipeError(f"{method.name}(ids=...): expected ids from 0 to {len(table) - 1}")
    index = torch.tensor([ids[i % len(ids)] for i in range(length)], device=table.device)
    return table.detach()[index].float()
