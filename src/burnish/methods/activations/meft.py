from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.tape.reversible import Reversible, reversible_blocks
from ...blocks.tape.segment import Segment
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Meft(Method):
    """MEFT: reversible blocks that keep nothing and start near the pre-trained model.

    Two streams, ``h1 = h2 = x`` at first; per block, with scalars l (`lam`) and b (`beta`)

        y1 = l h1 + F(h2),   y2 = b h2 + G(y1),   next (h1, h2) = (y2, y1)

    B the pre-trained block with its residuals, A an adapter ``W_up act(W_down h + a) + c``
    (r x d, d x r):

    * variant 1: ``F(h) = B(h) + A(B(h))``, G = A'; l = 0.1, b = 1; y1 is the state;
    * variant 2: F = A', ``G(h) = B(h) + A(B(h))``; l = 1, b = 0.1; y2 is the state.

    The model's later parts read the state. Start: W ~ N(0, 0.02^2) and biases 0, so adapters are
    nearly 0 and outputs are off the pre-trained ones by O(l) (O(b) in variant 2) and the adapters'
    size; an exact start is not invertible. Trains 2 (2 d r + r + d) per block, and in variant 1 one
    adapter less: nothing reads the last block's y2.

    Kept for backward: 0 per block; the pair before the last block and before an anchor every
    `anchors` blocks (2 / S hidden states), in fp32 at least; one live block. Backward takes inputs
    from outputs, ``h2 = (y2 - G(y1)) / b``, ``h1 = (y1 - F(h2)) / l``, with the forward's dropout
    masks. That multiplies rounding by 2 / (sqrt(1 + 4 l b) - 1) per block, 10.9 at the defaults:
    anchors=None keeps a pair as often as an error of 1e-3 needs (every 4 blocks in fp32, 13 in
    fp64, each in half precision); anchors=0 keeps none, as in the paper, and warns when rounding
    has grown. ``streams="fixed"`` inverts exactly at any depth and precision: numbers on a grid of
    2^-16, the small factor 1/16, and 4 bits kept per number and block. Not mergeable.

    Refused: several stacks, blocks that return more than one state, read another tensor with a
    gradient or hold batch norms, models that do something between blocks, foreign checkpointing.

    Departures: MEFT3 (attention as F, the MLP as G) is not built: a block's own forward is not cut
    in two. The adapter stands behind the block and the head reads the state (unconfirmed).
    """

    paper: ClassVar[str] = ("Make Pre-trained Model Reversible: From Parameter to Memory Efficient "
                            "Fine-Tuning (2023), arXiv:2306.00477")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"one width"})

    bottleneck: int = setting(64, "r, width of the adapters")
    variant: Literal[1, 2] = setting(1, "1: the block is F; 2: the block is G")
    lam: float | None = setting(None, "l; None: 0.1, and 1 in variant 2", other=(0.5,))
    beta: float | None = setting(None, "b; None: 1, and 0.1 in variant 2", other=(0.5,))
    act: str = setting("gelu", "activation inside", other=("relu",))
    streams: Literal["float", "fixed"] = setting(
        "float", "fixed: whole multiples of 2^-16, inverted exactly at any depth and precision")
    layers: int | None = setting(None, "how many of the last blocks; None: all", other=(1,))
    anchors: int | None = setting(None, "blocks from one kept pair to the next; 0: none; None: as "
                                  "rounding allows", other=(1,))

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or self.anchors is not None and self.anchors < 0:
            raise RecipeError(f"meft(bottleneck={self.bottleneck}, anchors={self.anchors}): 1 or "
                              "more, and 0 or more, are expected")

    def repeats(self) -> int | None:
        return None if self.layers or self.anchors is None else max(1, self.anchors)

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def scales(self) -> tuple[float, float]:
        """(l, b). RecipeError where the streams could not be inverted."""
        small = 0.1 if self.streams == "float" else 1 / 16
        usual = (small, 1.0) if self.variant == 1 else (1.0, small)
        lam = usual[0] if self.lam is None else self.lam
        beta = usual[1] if self.beta is None else self.beta
        if not (lam > 0 and beta > 0):
            raise RecipeError(f"meft(lam={lam}, beta={beta}): both must be above 0 to be inverted")
        if self.streams == "fixed":
            if self.anchors is not None:
                raise RecipeError("meft(streams='fixed'): exact inversion needs no anchors")
            if not {lam, beta} <= {1.0, 1 / 2, 1 / 4, 1 / 16, 1 / 256}:
                raise RecipeError(f"meft(streams='fixed', lam={lam}, beta={beta}): factors are 1, "
                                  "1/2, 1/4, 1/16 or 1/256, so that whole bits are dropped")
        return lam, beta

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        for b in reversible_blocks(self, anatomy, self.layers):
            yield Branch(b.path, self._adapter(anatomy))

    def _adapter(self, anatomy: Anatomy) -> Bottleneck:
        return Bottleneck(anatomy.hidden_size, self.bottleneck, act=self.act, init="bert")

    def activations(self, anatomy: Anatomy) -> Segment:
        blocks = reversible_blocks(self, anatomy, self.layers)
        scales = self.scales()

        def run(i: int, attacher: Any) -> Reversible:
            above = len(blocks) - 1 - i
            read = self.variant == 2 or above > 0
            return Reversible(attacher.state, attacher.adapter.name, i, above, scales,
                              self._adapter(anatomy) if read else None, anchors=self.anchors,
                              block_first=self.variant == 1, fixed=self.streams == "fixed"
                              ).to(attacher.device(blocks[i].path))

        return Segment(tuple(b.path for b in blocks), run)

    def count(self, blocks: int, d: int) -> int:
        """Trainable parameters of so many reversible blocks of width d."""
        return (2 * blocks - (self.variant == 1)) * Bottleneck.count(d, self.bottleneck)
