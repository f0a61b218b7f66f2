from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.parallel_head import InPlaceOf, ParallelHead, Tapped
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ..branch._sites import samples_first
from ._beside import Cached, frozen, narrowed, still, width

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class UniPT(Cached):
    """UniPT: one head beside a frozen backbone that reads the states of all its layers at once.

    With H_0 .. H_L what goes into the first block and what comes out of each, ``X_l = Norm(D_l
    H_l)`` of width S = D / reduction, and ``C_l = I + relu(X_L X_l^T)``, its rows divided by their
    sums before I is added:

        y = U relu(X_L + Norm(P sum_{l<L} b_l C_l X_l))

    b the softmax over l of ``w (mean(X_L) * mean(X_l))``, means over a sample's tokens; tokens
    of padding are left out of sums and means. y stands in place of the backbone's last normed
    state, and the model's own head reads it. D_l (S, D), P (S, S) and U (D, S) have biases.

    Start: as linears start. Not the pre-trained function. Trains (L + 1) (D S + 3 S) + S^2 + 3 S +
    S D + D + S. Kept for backward: H_l once for D_l, D_l H_l, the head's last states; what is
    tokens x tokens is made again layer by layer, and X_l too under the lean tape. No block keeps
    anything, and backward never enters one. Not mergeable.

    The frozen backbone runs in evaluation mode. Models that write on token by token are refused: C
    and the means look at a sequence as a whole. So are several stacks, and anything that trains
    inside the backbone. Departures: U's width is the backbone's, so that the model's head fits; the
    published w has a bias, which the softmax does not see.

    cache="folder" keeps H_l on disk by sample, for data that do not change: a batch that is all
    there runs no block (blocks/state/tap_cache.py).
    """

    paper: ClassVar[str] = ("UniPT: Universal Parallel Tuning for Transfer Learning with Efficient "
                            "Parameter and Memory (2023), arXiv:2308.14316")
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"whole reading"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    excused: ClassVar[dict[str, str]] = {
        "bf16_is_near_fp32 on points": "tokens that are nearly alike there: the error halves where "
                                       "they are spread"}

    reduction: int = setting(2, "D / S, the backbone's width over the head's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1:
            raise RecipeError(f"unipt(reduction={self.reduction}): 1 or more")

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def side(self, anatomy: Anatomy) -> UniPT:
        if self.targets is not None:
            raise RecipeError("unipt takes no targets: it reads all blocks")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, model = attacher.anatomy, attacher.model
        (blocks,) = anatomy.stacks().values()
        frozen(attacher, part, tuple(f"{h}." for h in anatomy.head))
        d = width(anatomy, part, [blocks])
        small = narrowed(self, d)
        still(attacher, part, [blocks])
        state, name = attacher.state, attacher.adapter.name
        cache = self.keeping(attacher, blocks)
        for i, block in enumerate(blocks):
            Tapped(state, name, enter=i == 0).kept(cache, i).listen(
                attacher.slot(block.path), part.name)
        like = next(p for p in model.get_submodule(blocks[0].path).parameters()
                    if p.is_floating_point())
        head = ParallelHead(len(blocks) + 1, d, small)
        end = anatomy.final_norms.get(blocks[0].stack)
        made = InPlaceOf(state, name, head, norm=end is not None)
        made.to(device=like.device, dtype=like.dtype).listen(
            attacher.slot(end or blocks[-1].path), f"{part.name}_head")

    def count(self, blocks: int, d: int, small: int | None = None, out: int | None = None) -> int:
        """Trainable parameters beside so many blocks of width d. small, out: S and the width of y,
        where they are others."""
        s, e = small or d // self.reduction, out or d
        return (blocks + 1) * (d * s + 3 * s) + s * s + 3 * s + s * e + e + s
