from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.choose.budget import cubic
from ...blocks.choose.units import Pruner, off, unit_importance
from ...blocks.state.mask import UnitMask
from ...blocks.weight.factor import Chain
from ...core.errors import RecipeError
from ...core.groups import Group, groups, not_taken
from ...core.method import Method, setting
from ...core.site import Branch, Place, Site
from ..delta.lowrank.lora import check_dropout

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Loraprune(Method):
    """LoRAPrune: LoRA whose gradients also tell which heads and channels to take out.

    ``W' = W + s B A``, s = alpha / rank. The gradient of W is read off the factors':
    ``G = dB A + B dA - dB dA``; an entry's importance is ``|G * W'|``. A unit's importance is the
    sum over its rows of q, k, v (or gate, up) and its columns of o (or down), each matrix's scores
    divided by their l2 norm; smoothed as ``I <- decay I + (1 - decay) I_now`` at every update.
    Units: key-value heads with their query heads, and the inner channels of MLPs. Every `every`
    updates the ``floor(r(t) units)`` weakest of each attention and MLP are switched off (their
    columns read zeros), r rising from 0 to `ratio` as a cubic between `warmup` and 1 - `cooldown`
    of the run; who is off may come back. The first `spare` of the blocks and the last stay whole.

    ``tuned.shrink()`` merges and slices: a smaller dense model. With ``spare=0`` all blocks end
    alike, which is what a transformers config can say: of heads where it names their width, and of
    a Llama's only a number that divides the hidden size (a note says so beforehand); elsewhere
    ``units="channels"``. One unit of each always lives.

    Start: B = 0, the pre-trained function exactly. Trains rank (in + out) per matrix; kept for
    backward as LoRA, and one number per masked channel. Importance is reduced panel by panel:
    nothing of W's size is made, and W needs no gradient. Without ``tuned.total_steps`` nothing is
    pruned. `dropout` acts on the input of A (published: 0.05). Importance is the authors' code's;
    the paper's text squares it. (That code has 32 heads of 128 written into it.)
    """

    paper: ClassVar[str] = ("LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient "
                            "Fine-Tuning (2023), arXiv:2305.18403")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs: ClassVar[frozenset[str]] = frozenset({"units"})
    relies_on: ClassVar[tuple[str, ...]] = ("gradients",)
    small: ClassVar[dict[str, float]] = {"spare": 0.0}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    ratio: float = setting(0.5, "share of the units that are taken out in the end")
    units: Literal["both", "heads", "channels"] = setting(
        "both", "what is taken out: heads of attention, inner channels of MLPs, or both")
    every: int = setting(10, "updates between two choices")
    warmup: float = setting(0.1, "share of the run before pruning begins")
    cooldown: float = setting(0.1, "share of the run after the last rise of the ratio")
    spare: float = setting(0.1, "share of the blocks, from the first, left whole; the last too; "
                                "0: none",
                           unseen="of two blocks none can be spared: "
                                  "tests/methods/test_loraprune.py")
    decay: float = setting(0.9, "of the smoothed importance")
    dropout: float = setting(0.0, "dropout on the input of A (the authors: 0.05)",
                             alias=("lora_dropout",))

    def __post_init__(self) -> None:
        check_dropout("loraprune", self.dropout)
        if not 0 <= self.ratio < 1 or not 0 <= self.spare < 1 or not 0 <= self.decay < 1:
            raise RecipeError("loraprune: ratio, spare and decay are shares in [0, 1)")
        if self.every < 1 or min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown > 1:
            raise RecipeError("loraprune: every >= 1 and warmup + cooldown <= 1 are expected")

    def repeats(self) -> int | None:
        return None if self.spare else 1

    def claims(self) -> tuple[str, ...]:
        return ("the units of attention and MLP",)

    def delta(self, site: Site) -> Chain:
        site.place.check_rank(self.rank, "loraprune")
        term = Chain(site.place, self.rank, self.alpha / self.rank, self.dropout)
        term.A.burnish_decay = term.B.burnish_decay = False
        return term

    def pruned(self, anatomy: Anatomy) -> list[Group]:
        """The groups that lose units."""
        first, last = len(anatomy.blocks) * self.spare, len(anatomy.blocks) - 1
        return [g for g in groups(anatomy)[0]
                if g.units > 1 and self.units in ("both", g.kind)
                and (not self.spare or first <= g.block < last)]

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        made = self.pruned(anatomy)
        if not made:
            raise RecipeError("loraprune: this model has no attention and no MLP whose units can "
                              f"be told outside the {self.spare:.0%} of its blocks that are "
                              "spared; spare=0 spares none")
        self._foresee(anatomy, made)
        for g in made:
            place, width = g.columns[0]
            yield Branch(place.path, UnitMask(g.units, width), compose="replace",
                         at="input")

    def _foresee(self, anatomy: Anatomy, made: list[Group]) -> None:
        """A note where the number of heads in the end is one that no folder of this model has."""
        heads = next((g for g in made if g.kind == "heads"), None)
        if heads is None or self.spare:                  # ragged in any case
            return
        n = heads.units - off(self.ratio, heads.units)
        if n < heads.units and (why := not_taken(anatomy, heads, n)):
            fit = [k for k in range(1, heads.units) if not not_taken(anatomy, heads, k)]
            anatomy.asked.notes.append(
                f"loraprune(ratio={self.ratio}) leaves {n} of {heads.units} key-value heads, which "
                f"{why} shrink() will want ragged=True; "
                + (f"{', '.join(map(str, fit))} would do, or " if fit else "")
                + "units='channels'")

    def share(self, step: int, total: int) -> float:
        """r(t)."""
        return cubic(0.0, self.ratio, step, self.warmup * total, (1 - self.cooldown) * total)

    def controller(self, tuned: Tuned) -> Pruner:
        made, terms = self.pruned(tuned.anatomy), dict(tuned.terms(Chain))
        masks = dict(tuned.branches(UnitMask))
        return Pruner(made, [masks[g.out.path] for g in made],
                      lambda g: unit_importance(g, terms, tuned.weight), self.share, self.every,
                      self.decay)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)
