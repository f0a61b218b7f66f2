from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.choose.observe import SquaredGradient
from ...core.errors import RecipeError
from ...core.method import setting
from ._beside import Cached

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
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

    The forms of QST: ``down="low_rank"``, ``D_i h = Norm(B_i swish(A_i h))``, A_i (bottleneck, d),
    B_i (d / R, bottleneck), or of no parameters: the mean or the largest of every R channels, a
    random linear that stays; s_0 is the first block's own D then. ``gate="channel"``:
    ``w_i = sigmoid(z_i)`` for each channel, z_i at 0.5 and the last at -1 (w = 0.27) at the start.

    Start: gates 1/2, D and U as linears start; g_i cut out of backbone block i by importance |W|,
    or (``init="fisher"``) the squared gradients of the task's loss, sample by sample, over data
    read beforehand; ``init="random"``: as its class starts. Not the pre-trained function.
    Trains g_i, D_i, D_first, U, gates and the last norms, about P / R^2 + (L + 2) d^2 / R.
    Kept for backward per kept block: h_i for a D_i that trains, and the small block's own tape over
    R; no backbone block keeps anything, and backward never enters it. Not mergeable. Reading Fisher
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
                            "Learning (2022), arXiv:2206.06522; forms of Quantized Side Tuning "
                            "(2024), arXiv:2401.07159")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"ladder"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, int]] = {"bottleneck": 16}

    reduction: int = setting(8, "R, the backbone's widths over the side network's")
    layers: tuple[int, ...] | list[int] | None = setting(
        None, "blocks of each stack with a rung; None: all", other=((0,),))
    down: Literal["linear", "low_rank", "mean", "max", "random"] = setting(
        "linear", "how a state is narrowed")
    bottleneck: int = setting(16, "within a D of low rank", least=1, beside={"down": "low_rank"})
    gate: Literal["layer", "channel"] = setting("layer", "what has a gate of its own")
    init: Literal["prune", "fisher", "random"] = setting("prune", "start of the side blocks")
    samples: int = setting(1024, "read before training", beside={"init": "fisher", "samples": 1},
                           other=(2,), least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.down != "low_rank" and self.bottleneck != Lst.bottleneck:
            raise RecipeError(f"lst(bottleneck={self.bottleneck}) is that of down='low_rank', and "
                              f"down={self.down!r} has none: leave it out")

    @property
    def channels(self) -> bool:
        return self.gate == "channel"

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def repeats(self) -> int | None:
        return None if self.layers else 1

    def observe(self, place: Place) -> SquaredGradient | None:
        return SquaredGradient(place.out, place.inp) if self.init == "fisher" else None

    def side(self, anatomy: Anatomy) -> Ladder:
        from ._ladder import ladder

        return ladder(self, anatomy)

    def narrow(self, width: int, what: str) -> int:
        """A width divided by R, or an error that names the divisors."""
        if self.reduction < 1 or width % self.reduction:
            fits = [r for r in (2, 4, 8, 16, 32) if width % r == 0]
            raise RecipeError(f"lst(reduction={self.reduction}): {what} = {width} is not "
                              f"divisible by it; {', '.join(map(str, fits))} are possible")
        return width // self.reduction

    def count(self, blocks: int, d: int, small_block: int, norm: int = 2) -> int:
        """Trainable parameters beside one stack: `blocks` rungs of a side block with so many,
        widths d and d / R (a final norm of scale and shift, or of norm=1)."""
        s, q = d // self.reduction, self.bottleneck
        downs = {"linear": (blocks + 1) * (d * s + s), "low_rank": blocks * (d * q + q * s + 2 * s)}
        gates = blocks * s + d if self.channels else blocks + 1
        return blocks * small_block + downs.get(self.down, 0) + gates + (s * d + d) + norm * s
