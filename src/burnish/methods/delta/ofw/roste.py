from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ....blocks.choose.observe import Statistic
from ....blocks.state.attending import open_attentions
from ....blocks.weight.turned import RoundedKeys, Turned, TurnErrors
from ....blocks.weight.walsh import Walsh
from ....core.anatomy import Anatomy
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ...prompt._stacks import key_width


@dataclass(frozen=True, kw_only=True)
class Roste(Method):
    """RoSTE: weights, inputs, keys and values in few bits while they train, turned where it helps.

        y = Q_x(x R) Q_w(V R)^T + b             R = diag(+-1) H / sqrt(in), or the identity
        dx = (dy Q_w(V R)) R^T,  dV = (dy^T Q_x(x R)) R^T        straight through the rounding

    V is the weight and what is added to it: ``full + roste`` trains the weight (the paper's),
    ``lora + roste`` a LoRA inside Q_w. Q_w: 2^(bits-1) - 1 steps to either side of zero, one scale
    per output; Q_x: 2^input_bits numbers over `clip_ratio` of the range of a token, and zero. H is
    a Walsh-Hadamard matrix, signs drawn from `seed` are the same for all layers of one width;
    widths that have none turn in blocks (blocks/weight/walsh.py). Keys and values (behind rotary
    positions) lie on grids of 2^kv_bits numbers per token and head; queries, keys and values are
    turned by H of a head's width, which changes no product.

    R is chosen once, before training, as calibration data show it: at each linear whichever of H
    and the identity has the smaller ``|Q_x(xR) - xR|^2 / |x|^2 + |Q_w(WR) - WR|^2 / |W|^2``
    (`samples` are read; the file says which). `rotation` takes one for all without data.

    Start: the rounded model, not the pre-trained function. Trains nothing itself, so it saves
    nothing of what `full` holds; what is kept of x are its codes (4 bits a number), and the rounded
    weight is made again in backward, one layer at a time. No merge: a plain module does not round
    what it reads. The head stays as it is.

    From the text: which error chooses a turn, grids of the inputs and clip ratios are not printed.
    Departures: one choice before training (K = 1, as in the paper's practice). Every linear turns
    its own input, where a deployment folds the turns of the residual stream into the weights before
    and norms must become RMSNorms for it: the numbers that are rounded are the same, a choice per
    linear is finer. The attention's turns are chosen by `rotation` alone.
    """

    paper: ClassVar[str] = ("RoSTE: An Efficient Quantization-Aware Supervised Fine-Tuning "
                            "Approach for Large Language Models (2025), arXiv:2502.09003")
    tier: ClassVar[str] = "from the text"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    by_data: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs: ClassVar[frozenset[str]] = frozenset({"open attention"})    # but where kv_bits is 0
    shown_beside: ClassVar[str] = "lora(rank=4)"

    bits: int = setting(4, "of a weight, 2 to 8")
    input_bits: int = setting(4, "of what a linear reads, 2 to 8")
    kv_bits: int = setting(4, "of keys and values, 2 to 8; 0: these stay as they are")
    clip_ratio: float = setting(1.0, "share of a token's range that its grid spans", other=(0.7,))
    rotation: Literal["chosen", "hadamard", "none"] = setting(
        "chosen", "where coordinates are turned: as data show, everywhere, nowhere")
    samples: int = setting(8, "samples to read", other=(1,))
    seed: int = setting(0, "of the signs", other=(1,))

    def __post_init__(self) -> None:
        for name in ("bits", "input_bits", "kv_bits"):
            n = getattr(self, name)
            if not (2 <= n <= 8 or name == "kv_bits" and n == 0):
                raise RecipeError(f"roste: {name}={n}: expected 2 to 8")
        if not 0 < self.clip_ratio <= 1:
            raise RecipeError(f"roste: clip_ratio={self.clip_ratio}: expected above 0, at most 1")
        if self.samples < 1:
            raise RecipeError(f"roste: samples={self.samples}: expected at least 1")
        idle = {"none": {"samples", "seed"}, "hadamard": {"samples"}}.get(self.rotation, set())
        if given := sorted(idle & self.changed().keys()):
            acts = "'chosen' or 'hadamard'" if given == ["seed"] else "'chosen'"
            raise RecipeError(f"roste: {' and '.join(given)} do nothing with "
                              f"rotation={self.rotation!r}; expected rotation={acts}, or "
                              f"{' and '.join(given)} left out")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",
                *(("how attention is computed",) if self.kv_bits else ()))

    def term(self, place: Place, turn: bool) -> Turned:
        return Turned(place.inp, self.bits, self.input_bits, self.clip_ratio,
                      Walsh(place.inp, self.seed) if turn else None)

    def observe(self, place: Place) -> TurnErrors | None:
        if self.rotation != "chosen" or place.role == "head":
            return None
        return TurnErrors(self.term(place, True))

    def settle(self, seen: Mapping[Place, Statistic]) -> Mapping[Place, dict[str, Any]]:
        return {p: {"turn": bool(s.errors[1] < s.errors[0])} for p, s in seen.items()
                if isinstance(s, TurnErrors)}

    def delta(self, site: Site) -> Turned | None:
        if site.place.role == "head":
            return None
        turn = site.settled.get("turn", True) if self.rotation == "chosen" else \
            self.rotation == "hadamard"
        return self.term(site.place, turn)

    def branch(self, anatomy: Anatomy) -> Iterable[Keys]:
        paths = open_attentions(anatomy, self.name) if self.kv_bits else ()
        for number, block in enumerate(anatomy.blocks):
            if block.attn in paths:
                whole = key_width(anatomy, number, block, "", self.name)
                if not block.kv_heads:
                    raise RecipeError(f"roste: how many heads {block.attn} has cannot be told; "
                                      "kv_bits=0 leaves keys and values as they are")
                yield Keys(self, block.attn, whole // block.kv_heads)


@dataclass(frozen=True)
class Keys:
    """One attention, with heads of width h, finds its keys and values on grids."""

    method: Roste
    path: str
    h: int

    def install(self, attacher: Any, part: Method) -> None:
        m = self.method
        walsh = None if m.rotation == "none" else Walsh(self.h, m.seed)
        made = RoundedKeys(attacher.state, attacher.adapter.name, m.kv_bits, walsh)
        made.to(attacher.device(self.path)).listen(attacher.slot(self.path), part.name)
