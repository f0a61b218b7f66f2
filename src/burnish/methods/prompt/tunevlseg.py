from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from ...blocks.state.dice import Overlap
from ...blocks.state.generators import Common, OfCommon, Projected
from ...blocks.state.placed import Image, Meta, PerImage, Placed
from ...blocks.state.prompts import Tokens
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import Towers, refuse, towers, unmet
from ...core.outputs import base_class
from ...core.site import Selection
from ._stacks import states_as_they_were

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

Strategy = Literal["vpt", "coop", "cocoop", "maple", "shared_attention", "shared_separate"]
TEXT, BOTH = ("coop", "cocoop"), ("maple", "shared_attention", "shared_separate")


@dataclass(frozen=True, kw_only=True)
class Tunevlseg(Method):
    """TuneVLSeg: six ways to prompt a model that draws the mask of what a text names (CLIPSeg).

        vpt               rows (length, d_v) behind the tokens of the picture
        coop              rows (length, d_t) behind the first token of the text
        cocoop            the same, and W_2 relu(W_1 x + b_1) + b_2 of the picture's features x
                          added to the first block's
        maple             rows of the text, and P_i W_i^T + b_i of them for the picture
        shared_separate   rows u (length, hidden), a linear to d_t and one to d_v
        shared_attention  the same behind a transformer of one block and one head on u

    fresh in each of the first `layers` blocks, carried on behind them. What makes rows of common
    ones is one for all blocks. A text brings `length` placeholders behind its first token. Rows of
    a picture are taken out of every state that leaves its tower, so a decoder that reads states of
    several blocks reads the tokens it knows. Loss: the model's own (BCE) and `dice` times the Dice
    loss of its masks. Where a model runs its towers without a graph they have one.

    With ``coupled=False`` the rows of both sides are their own, as a finished file holds them.

    Start: rows N(0, 0.02^2), linears as they start; never the pre-trained function. Trains, J =
    layers, n = length, w = hidden: J n d_v; J n d_t; that + w (p + d_t) + w + d_t; J (n d_t + d_t
    d_v + d_v); J n w + (w + 1)(d_t + d_v), with attention 12 w^2 + 13 w more. Kept for backward:
    the towers' that have rows. Not mergeable. Of a matcher of pictures and texts (CLIP) too, whose
    loss stays its own. Rates from 1e-5 to 5e-3 were searched, AdamW; vpt is a strong first try.

    Departures: their decoder carries the picture's rows to its end; the norms of the transformer
    are those of `mvlpt`.
    """

    paper: ClassVar[str] = ("TuneVLSeg: Prompt Tuning Benchmark for Vision-Language Segmentation "
                            "Models (2024)")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"towers within"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    takes_head: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"layers": 2}

    strategy: Strategy = setting("vpt", "which of the six")
    length: int = setting(4, "rows per block", alias=("n_ctx", "num_context"))
    layers: int = setting(9, "how many of the first blocks", alias=("prompt_depth",), other=(1,))
    hidden: int = setting(64, "width of common rows, or of the MLP that follows the picture",
                          beside={"strategy": "shared_separate"}, other=(6,))
    coupled: bool = setting(True, "rows of pictures and texts are made of the same",
                            beside={"strategy": "maple"})
    dice: float = setting(1.0, "weight of the Dice loss of masks",
                          unseen="its models draw no masks: tests/methods/test_tunevlseg.py")
    decoder: bool = setting(False, "the last layer of the decoder trains too",
                            unseen="its models have no decoder of masks: "
                                   "tests/methods/test_tunevlseg.py")

    def __post_init__(self) -> None:
        if min(self.length, self.layers, self.hidden) < 1 or self.dice < 0:
            raise RecipeError("tunevlseg: length, layers and hidden of at least 1 and a dice of at "
                              "least 0 are expected")
        reads = self.strategy == "cocoop" or self.coupled and self.strategy.startswith("shared")
        if not reads and self.hidden != Tunevlseg.hidden:
            raise RecipeError(f"tunevlseg: hidden={self.hidden} does nothing beside strategy="
                              f"{self.strategy!r}{'' if self.coupled else ', coupled=False'}")
        if not self.coupled and self.strategy not in BOTH:
            raise RecipeError(f"tunevlseg: strategy={self.strategy!r} prompts one side, and coupled"
                              "=False is of two")

    def repeats(self) -> int | None:
        return None

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        if not self.decoder:
            return
        last = [p for p, m in anatomy.model.named_modules() if isinstance(m, nn.ConvTranspose2d)]
        if not last:
            raise RecipeError(f"tunevlseg(decoder=True): {base_class(anatomy.model).__name__} has "
                              "no transposed convolution that draws a mask")
        for name, _ in anatomy.model.get_submodule(last[-1]).named_parameters(recurse=False):
            yield Selection(f"{last[-1]}.{name}")

    def prompt(self, anatomy: Anatomy) -> Tunevlseg:
        two = towers(anatomy, within=True)
        if self.targets is not None:
            raise RecipeError("tunevlseg takes no targets: it stands in the first blocks; say how "
                              "many with layers")
        if two is None or unmet(type(self), anatomy):
            refuse(self, anatomy)
        most = min(len(two.text) if self.strategy != "vpt" else self.layers,
                   len(two.vision) if self.strategy not in TEXT else self.layers)
        if self.layers > most:
            raise RecipeError(f"tunevlseg(layers={self.layers}): the towers have {len(two.text)} "
                              f"and {len(two.vision)} blocks; at most {most}")
        if "dice" in self.changed() and towers(anatomy) is not None:
            raise RecipeError("tunevlseg: dice does nothing to a model that draws no masks")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        two = towers(attacher.anatomy, within=True)
        d, out = attacher.model.get_submodule(two.table).embedding_dim, two.vision[0].hidden_size
        shared = self.strategy.startswith("shared") and self.coupled
        common = Common(self.hidden, (d, out), self.strategy == "shared_attention") \
            if shared else None
        if self.dice and towers(attacher.anatomy) is None:
            Overlap(attacher.state, attacher.adapter.name, self.dice).listen(
                attacher.slot(""), f"{part.name}_dice")
        texts = self._texts(attacher, part, two, d, common) if self.strategy != "vpt" else []
        if self.strategy not in TEXT:
            self._pictures(attacher, part, two, texts, out, common)

    def _texts(self, attacher: Any, part: Method, two: Towers, d: int, common: Common | None
               ) -> list[Placed]:
        state, name, made = attacher.state, attacher.adapter.name, []
        meta = Meta(two.joint, self.hidden, d) if self.strategy == "cocoop" else None
        for i in range(self.layers):
            path = two.text[i].path if i else two.table
            rows = torch.randn(self.length, self.hidden if common else d) * 0.02
            maker = OfCommon(common, 0, rows, owns=not i) if common else None
            own = Placed(state, name, None if maker else rows, entering=i > 0, maker=maker,
                         meta=None if i else meta).to(attacher.device(path))
            own.listen(attacher.slot(path), part.name)
            made.append(own)
        if meta is not None:
            Image(state, name).listen(attacher.slot(two.image), f"{part.name}_image")
            if towers(attacher.anatomy) is not None:
                PerImage(state, name).listen(attacher.slot(""), f"{part.name}_pairs")
        return made

    def _pictures(self, attacher: Any, part: Method, two: Towers, texts: list[Placed], out: int,
                  common: Common | None) -> None:
        state, name, n = attacher.state, attacher.adapter.name, self.length
        for i, block in enumerate(two.vision):
            maker: nn.Module | None = None
            fresh, made = i < self.layers, self.coupled and bool(texts)
            if fresh and made:
                maker = OfCommon(common, 1, None, source=texts[i].maker) if common else \
                    Projected(texts[i], texts[i].rows.shape[1], out)
            rows = torch.randn(n, out) * 0.02 if fresh and not made else None
            Tokens(state, name, n, rows, after=None, enter=i == 0, leave=i + 1 == len(two.vision),
                   maker=maker).to(attacher.device(block.path)).listen(
                       attacher.slot(block.path), part.name)
        states_as_they_were(attacher, part, two.vision[0].stack, n, None)

    def finished(self) -> Tunevlseg:
        return replace(self, coupled=False, hidden=Tunevlseg.hidden) if self.strategy in BOTH \
            else self

    def count(self, d: int, out: int, p: int = 512) -> int:
        """Trainable parameters at text width d, pictures of width `out`, meeting in p."""
        J, n, w = self.layers, self.length, self.hidden
        if self.strategy in ("vpt", *TEXT):
            follows = w * (p + d) + w + d if self.strategy == "cocoop" else 0
            return J * n * (out if self.strategy == "vpt" else d) + follows
        if not self.coupled:
            return J * n * (d + out)
        if self.strategy == "maple":
            return J * (n * d + d * out + out)
        attends = 12 * w * w + 13 * w if self.strategy == "shared_attention" else 0
        return J * n * w + (w + 1) * (d + out) + attends
