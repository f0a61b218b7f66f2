from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.pooled import Asked, AtMask, Pooled
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Codeprompt(Method):
    """CodePrompt: a classifier reads the mask of a template through all layers.

        f = sum_l a_l h^l,   a = softmax_l(w^T tanh(W h^l)),   y = head(f)

    h^l (d) the state of the mask after block l of the last `layers`, W (bottleneck, d), w
    (bottleneck). The text is written in a template with one `mask` token ("code [X] [MASK]"), hard
    words or soft ones (``zecoler(placeholder=..)`` beside it); samples without it, or with two, are
    refused, since truncation must leave it. ``mask=None`` reads the first token.

    As published the language model trains too: ``full + codeprompt``. By itself the model is frozen
    and nothing below the head has a graph; the head trains (``head="auto"``).

    Start: w = 0, the mean of the layers: never the pre-trained function. Trains bottleneck (d + 1),
    and the head. Kept for backward: `layers` states a sample. Not mergeable.

    Best reading: the pooling's form. The head is the model's own (of RoBERTa its two layers). Each
    block hands its state on, so blocks run as they are: checkpointing is refused.
    """

    paper: ClassVar[str] = ("CodePrompt: Improving Source Code-Related Classification with "
                            "Knowledge Features through Prompt Learning (2024), arXiv:2401.05544")
    tier: ClassVar[str] = "from the text"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "whole reading", "head"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    shown_beside: ClassVar[str] = "lora(rank=4, targets='q,v')"

    mask: int | None = setting(None, "token id that is asked about; None: the first token",
                               unseen="a text without it is refused: "
                                      "tests/methods/test_codeprompt.py")
    bottleneck: int = setting(0, "rows of W; 0: as many as a state has numbers", other=(5,))
    layers: int | None = setting(None, "how many of the last blocks are read; None: all",
                                 other=(1,))

    def __post_init__(self) -> None:
        if self.bottleneck < 0 or self.mask is not None and self.mask < 0:
            raise RecipeError(f"codeprompt(mask={self.mask}, bottleneck={self.bottleneck}): "
                              "expected a token id and a width of 0 or more")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def unread(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The head reads states of blocks: no pooler, no norm behind the last one."""
        pooled = [p.path for p in anatomy.places if p.role == "pooler" and p.block is None]
        last = anatomy.final_norms.values()
        return tuple(dict.fromkeys((*pooled, *(n for n in last if n not in anatomy.head))))

    def prompt(self, anatomy: Anatomy) -> Codeprompt:
        if self.targets is not None:
            raise RecipeError("codeprompt takes no targets: say how many blocks are read with "
                              "layers")
        if unmet(type(self), anatomy) or len(anatomy.head) == 0:
            refuse(self, anatomy)
        if self.layers is not None and not 1 <= self.layers <= len(anatomy.blocks):
            raise RecipeError(f"codeprompt(layers={self.layers}): the model has "
                              f"{len(anatomy.blocks)} blocks")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        d, head = anatomy.blocks[-1].hidden_size, _above(anatomy.head)
        if head not in {n.partition(".")[0] for n in anatomy.head}:
            raise RecipeError("codeprompt: the head of this model is in several modules")
        for block in anatomy.blocks[-(self.layers or 0):]:
            AtMask(state, name).listen(attacher.slot(block.path), part.name)
        Pooled(state, name, d, self.bottleneck or d).to(attacher.device(anatomy.head[0])).listen(
            attacher.slot(head), part.name)
        if self.mask is not None:
            Asked(state, name, self.mask).listen(attacher.slot(""), f"{part.name}_ids")

    def count(self, d: int) -> int:
        """Trainable parameters at width d, the model's own head left out."""
        return (self.bottleneck or d) * (d + 1)


def _above(paths: tuple[str, ...]) -> str:
    """The module that holds all of these."""
    return ".".join(commonprefix([p.split(".") for p in paths]))
