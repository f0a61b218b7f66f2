from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.choose.observe import SquaredGradient
from ...core.errors import RecipeError
from ...core.method import setting
from ._beside import Cached

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.site import Place
    from ._ladder import Ladder


@dataclass(frozen=True, kw_only=True)
class Lst(Cached):
    """LST: a ladder of small transformer blocks beside a backbone that runs without a graph.

    ``s_0 = D_first h_0``; for each kept block i ``u = w_i s + (1 - w_i) D_i h_i``, ``s = g_i(u)``,
    with h_i what backbone block i returned (no gradient), D_i (d / R, d) with bias,
    ``w_i = sigmoid(a_i / 0.1)``, a_i a scalar, and g_i a block of the backbone's own class with
    every width divided by R and the same number of heads. At the end
    ``y = w U Norm(s) + (1 - w) h_L`` in place of the backbone's last normed state, U (d, d / R).
    Beside an encoder-decoder stand two ladders: the encoder's ends with ``Norm(s)``, and that is
    what the decoder's g_i attend to; the decoder's blocks themselves go on reading the encoder.
    Relative positions that a stack shares are shared in its ladder, from a table of its own.

    Start: gates 1/2, D and U as linears start; g_i cut out of backbone block i by importance |W|,
    or (``init="fisher"``) the squared gradients of the task's loss, sample by sample, over data
    read beforehand; ``init="random"``: as its class starts. Not the pre-trained function.
    Trains g_i, D_i, D_first, U, gates and the last norms, about P / R^2 + (L + 2) d^2 / R.
    Kept for backward per kept block: h_i for D_i, once, and the small block's own tape over R; no
    backbone block keeps anything, and backward never enters it. Not mergeable. Reading Fisher
    information holds the fp32 squared gradients of what must be cut together (q, k, v; gate, up)
    on the host, and row sums of the rest; files hold what was cut, so a load reads no data.

    The frozen backbone runs in evaluation mode (dropout would only make its states noisy). The
    side network has the model's dtype. In generation its keys and values stand behind the
    backbone's in the same cache. Where a block's class cannot be built from a config, a plain
    pre-norm block with the same attention mask stands in, and `notes` says so. Models of two
    towers are refused, and so is anything that trains inside the backbone.

    cache="folder" keeps h_i on disk by sample, for data that do not change: a batch that is all
    there runs no block (blocks/state/tap_cache.py). Refused beside an encoder-decoder, and for
    plain side blocks where attention has a mask; what fills a key-value cache runs the backbone.
    """

    paper: ClassVar[str] = ("LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer "
                            "Learning (2022), arXiv:2206.06522")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"ladder"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    reduction: int = setting(8, "R, the backbone's widths over the side network's")
    layers: tuple[int, ...] | list[int] | None = setting(
        None, "blocks of each stack with a rung; None: all", other=((0,),))
    init: Literal["prune", "fisher", "random"] = setting("prune", "start of the side blocks")
    samples: int = setting(1024, "read before training", beside={"init": "fisher", "samples": 1},
                           other=(2,))

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def repeats(self) -> int | None:
        return None if self.layers else 1

    def observe(self, place: Place) -> SquaredGradient | None:
        return SquaredGradient(place.out, place.inp) if self.init == "fisher" else None

    def side(self, anatomy: Anatomy) -> Ladder:
        from ._ladder import Ladder

        if self.targets is not None:
            raise RecipeError("lst takes no targets: it reads whole blocks; choose them with "
                              "lst(layers=[...])")
        stacks = anatomy.stacks()
        if not stacks:
            raise RecipeError("lst: no repeated blocks were found in this model")
        pair = anatomy.encoder_decoder()
        if pair is None and len(stacks) > 1:
            raise RecipeError(f"lst: this model has several stacks of blocks "
                              f"({', '.join(stacks)}); a ladder stands beside one, or beside an "
                              "encoder and its decoder")
        if pair is None and any(b.cross for b in anatomy.blocks):
            raise RecipeError(f"lst: the blocks of {next(iter(stacks))} attend to an encoder that "
                              "is no part of this model, so the side blocks could not")
        return Ladder(self, tuple((stacks[n], self._kept(stacks[n])) for n in pair or stacks))

    def _kept(self, blocks: list[Block]) -> frozenset[int]:
        asked = range(len(blocks)) if self.layers is None else self.layers
        wrong = [i for i in asked if not -len(blocks) <= i < len(blocks)]
        if wrong:
            raise RecipeError(f"lst(layers=...): there is no block {wrong[0]}; this model has "
                              f"{len(blocks)}, counted from 0")
        return frozenset(i % len(blocks) for i in asked)

    def narrow(self, width: int, what: str) -> int:
        """A width divided by R, or an error that names the divisors."""
        if self.reduction < 1 or width % self.reduction:
            fits = [r for r in (2, 4, 8, 16, 32) if width % r == 0]
            raise RecipeError(f"lst(reduction={self.reduction}): {what} = {width} is not "
                              f"divisible by it; {', '.join(map(str, fits))} are possible")
        return width // self.reduction

    def count(self, blocks: int, d: int, small_block: int) -> int:
        """Trainable parameters beside one stack: `blocks` rungs of a side block with so many,
        widths d and d / R (a final norm of scale and shift)."""
        s = d // self.reduction
        return blocks * (small_block + d * s + s + 1) + (d * s + s) + (s * d + d) + 1 + 2 * s
