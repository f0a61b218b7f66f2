from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...blocks.state.pyramid import Answer, Own, Picture, Pyramid
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import head_linear, patches, refuse, unmet
from ...core.site import Selection
from ..prompt.vpt import special_tokens

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Hst(Method):
    """HST: a pyramid of maps beside a vision transformer, which answers in place of its head.

    Before every block i stands a token e_i (1, d) of its own, taken out behind it; m_i is what it
    has become, v_i the patches. The pyramid has a stage for each of `widths` c, and stage k is told
    by the k-th run of L / stages blocks, with a block for each of them:

        x = Norm(conv(map before)),   v = B_k resized(v_i),   m = B_k m_i
        x = x + A(Norm x; [Norm m; mean v]) + v,   x = x + MLP(Norm x),   and a norm at the end

    A attention to those two tokens, MLP of 4 c, B_k (c, d) a stage's own, resized bilinearly to the
    map. The first conv is ``3x3 / 2, batch norm, relu, 2x2 / 2`` of the picture, the others are
    3x3 / 2: maps of 1/4, 1/8, 1/16, 1/32. ``y = W BatchNorm(mean of the last map) + b``.

    Start: linears N(0, 0.02^2), convs by fan-out, e_i Xavier: a new head, not the
    pre-trained function. Trains the pyramid, e_i, W, and all norms inside the blocks. Kept for
    backward: what frozen blocks keep, for a token more; v_i; the pyramid's maps. Backward crosses
    the whole transformer: this saves no memory as a ladder does. Not mergeable.

    The model's head is not read, so it cannot train beside it; checkpointed blocks are refused, and
    batches of one in training. Departures: the pyramid's last norm has no scale and shift (144 at
    the published widths), which the batch norm takes away; one `drop_path` for all blocks.
    """

    paper: ClassVar[str] = ("Hierarchical Side-Tuning for Vision Transformers (2023), "
                            "arXiv:2310.05393")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"pictures"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    takes_head: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"widths": (8, 16), "heads": (2, 4), "drop_path": 0.0}
    excused: ClassVar[dict[str, str]] = {
        "bf16_is_near_fp32 on timm_qkv": "two have hardly a variance; test_hst.py takes sixteen"}

    widths: tuple[int, ...] | list[int] = setting(
        (32, 48, 64, 72), "channels of the pyramid's stages", other=((8, 12),))
    heads: tuple[int, ...] | list[int] = setting((2, 4, 8, 12), "of the stages", other=((1, 2),))
    drop_path: float = setting(0.1, "drops a branch of a sample in the pyramid")

    def __post_init__(self) -> None:
        pairs = [*zip(self.widths, self.heads, strict=False)]
        if not pairs or len(self.widths) != len(self.heads) \
                or any(h < 1 or c < 1 or c % h for c, h in pairs):
            raise RecipeError(f"hst(widths={self.widths}, heads={self.heads}): expected as many of "
                              "both, and heads that divide their widths")
        if not 0 <= self.drop_path < 1:
            raise RecipeError(f"hst(drop_path={self.drop_path}): 0 or more, and below 1")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for path in (n for b in anatomy.blocks for n in b.norms):
            for leaf, _ in anatomy.model.get_submodule(path).named_parameters(recurse=False):
                yield Selection(f"{path}.{leaf}", decay=False)

    def side(self, anatomy: Anatomy) -> Hst:
        if self.targets is not None:
            raise RecipeError("hst takes no targets: it stands beside all blocks")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        if (n := len(anatomy.blocks)) % len(self.widths):
            raise RecipeError(f"hst(widths={self.widths}): {len(self.widths)} stages do not share "
                              f"{n} blocks evenly; give as many widths as divide them")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        if attacher.adapter.head:
            raise RecipeError("hst answers in place of the model's head, which would not train: "
                              "leave head=True out")
        (cut,), model = patches(anatomy), anatomy.model
        linear: Any = head_linear(anatomy)
        d, after = anatomy.hidden_size, special_tokens(model, anatomy.blocks[0].stack)
        like = {"device": attacher.device(linear.path),
                "dtype": model.get_submodule(linear.path).weight.dtype}
        Picture(state, name).listen(attacher.slot(cut.path), f"{part.name}_picture")
        v = (6 / (1 + d)) ** 0.5
        for block in anatomy.blocks:
            Own(state, name, torch.empty(1, d).uniform_(-v, v).to(**like), after).listen(
                attacher.slot(block.path), part.name)
        colours = model.get_submodule(cut.path).in_channels
        told = len(anatomy.blocks) // len(self.widths)
        pyramid = Pyramid(colours, d, self.widths, self.heads, told, self.drop_path)
        Answer(state, name, pyramid, self.widths[-1], linear.out).to(**like).listen(
            attacher.slot(linear.path), f"{part.name}_answer")

    def count(self, blocks: int, d: int, classes: int, channels: int = 3) -> int:
        """Trainable parameters beside so many blocks of two norms; `channels` of the picture."""
        c, last, each = self.widths[0], self.widths[-1], blocks // len(self.widths)
        convs = 9 * channels * c + 2 * c + 4 * c * c + c
        convs += sum(9 * a * b + b for a, b in pairwise(self.widths))
        stages = sum(2 * c + d * c + c + each * (12 * c * c + 15 * c) + 2 * c for c in self.widths)
        return convs + stages - 2 * last + last * classes + classes + blocks * d + blocks * 4 * d
