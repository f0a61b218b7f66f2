from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.choose.observe import Statistic
from ...blocks.choose.outliers import Weights, outliers
from ...blocks.update.live import Draw, LiveBlocks
from ...blocks.update.rules import AdamW
from ...blocks.update.step import Subspace
from ...blocks.update.subspace import SubspaceMap
from ...core.method import Method, setting
from ...core.recipe import key_of
from ...core.site import Place, Selection
from ._blocks import drawn, everything

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Owlore(Method):
    """OwLore: as LISA, but blocks with more outliers live more often, and step in a subspace.

        A_ij = |W_ij| ||x_j||_2     D_l = share of A_ij > outlier * mean of A, in block l
        every K updates:  live = gamma blocks, one after the other without replacement, p_l ~ D_l
        inside them GaLore of `rank`;  embedding, head and last norm: Adam, always

    ||x_j|| runs over calibration data (``tune(..., calibration=batches)``), once; a file knows what
    was counted. A block without outliers may still be drawn: 1e-8 is added to each D. Equal shares
    are `lisa`. Start: the function as it is. Live at once: n_E + n_H + n_norm + gamma n_block;
    state of a live matrix is a r + 2 c r numbers, a its short and c its long side. A block that
    leaves loses gradient, moments and projection; the last is made anew when it comes back. The
    draw of a period depends on seed and number alone; a promise is made of equal shares.

    Our reading: all linears of a block compete together (the score files that the authors' code
    loads are not public). Experts and attention projections held as one tensor are not counted.
    """

    paper: ClassVar[str] = ("OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for "
                            "Memory-Efficient LLM Fine-tuning, 2024, arXiv:2405.18380")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    relies_on: ClassVar[tuple[str, ...]] = ("schedule",)
    small: ClassVar[dict[str, Any]] = {"outlier": 1e3}   # none anywhere: each block has its turn
    excused: ClassVar[dict[str, str]] = {
        "exactly_what_trains_moves on swin": "six draws of one block in three leave one out; "
        "tests/methods/test_owlore.py"}

    layers: int = setting(5, "gamma, blocks live at once", alias=("gamma",), least=1)
    every: int = setting(50, "K, updates between draws", alias=("period", "K"), least=1)
    outlier: float = setting(13.0, "how many times its block's mean a score is above",
                             alias=("M",), above=0.0, unseen="counts are few in a small model: "
                                                             "tests/methods/test_owlore.py")
    samples: int = setting(128, "to read before training", least=1,
                           unseen="how many samples are read moves counts, not a run of few "
                                  "updates: tests/methods/test_owlore.py")
    rank: int = setting(256, "of the subspace", alias=("r",), least=1)
    refresh: int = setting(100, "T, updates of a matrix between two bases", other=(2,),
                           beside={"every": 9}, alias=("update_proj_gap", "T"), least=1)
    scale: float = setting(1.0, "of what comes back from the subspace", above=0.0)
    seed: int = setting(0, "of the draws")
    state_on_leave: Literal["drop", "cpu", "keep"] = setting(
        "drop", "optimizer state of a block that leaves: freed, moved to the host, or kept")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks", "the subspace of the gradient")

    def observe(self, place: Place) -> Weights:
        return Weights(place.inp, place.name)

    def settle(self, seen: Mapping[Place, Statistic]) -> Mapping[Place, dict[str, Any]]:
        return outliers(seen, self.outlier)

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        return everything(self, self.layers, anatomy)

    def optimizer(self) -> Subspace:
        return Subspace(map=SubspaceMap(rank=self.rank), every=self.refresh,
                        scale=self.scale, eps_first=True, name="owlore",
                        default=AdamW(eps=1e-6, weight_decay=0.0))

    def controller(self, tuned: Tuned) -> LiveBlocks:
        shares = self.shares(tuned)
        return drawn(tuned, lambda paths: Draw(paths, self.layers, self.every, self.seed, shares),
                     self.state_on_leave)

    def shares(self, tuned: Any) -> list[float]:
        """D of each block; all 0 where nothing has values."""
        known = tuned.adapters[tuned.training].settled.get(key_of(tuned.recipe, self), {})
        held = [[0, 0] for _ in tuned.anatomy.blocks]
        for place in tuned.anatomy.places:
            if (said := known.get(place.name)) and place.block is not None:
                held[place.block][0] += said["outliers"]
                held[place.block][1] += said["entries"]
        return [many / of if of else 0.0 for many, of in held]
