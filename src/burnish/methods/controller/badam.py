from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...blocks.update.live import InTurn, LiveBlocks, Order, TrainableSchedule
from ...blocks.update.step import Rounding
from ...core.asked import chosen
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Badam(Method):
    """BAdam: one block of the model trains at a time, for K updates of Adam, on an fp32 copy of it.

        every K updates:  the next block i,   w = fp32(theta_i),   m = v = 0,   t = 0
        w <- AdamW(w, dL/dtheta_i),   theta_i <- w

    A block is `layers` repeated blocks of the model, and with ``ends=True`` one more is all that
    stands outside them (embedding, last norm, head), which otherwise stays as it is. The start is
    the pre-trained function. Live at once: n / D of the n weights; copy and moments (12 bytes per
    live weight, in bf16) are freed when the block's turn is over, as its gradient is. Nothing below
    the lowest live block is gone back through or kept for it: half of backward, on average. With
    one block of all layers it is AdamW with master weights.

    Groups of the optimizer stay, so schedules of the learning rate go on; clipping sees the live
    block. Any innermost rule takes Adam's place (``badam + adam8bit``), in fp32 weights there is no
    copy. A tensor that blocks share lives with each of them; one that is read outside, too, is of
    the outside. Learning rates of 1e-6 to 1e-5 are published. The order of a period depends on
    seed and number alone. A promise is made of the lowest block, or of the outside.

    Departure: a block whose turn comes twice running keeps its moments.
    """

    paper: ClassVar[str] = ("BAdam: A Memory Efficient Full Parameter Optimization Method for "
                            "Large Language Models, NeurIPS 2024")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    small: ClassVar[dict[str, Any]] = {"every": 1}
    relies_on: ClassVar[tuple[str, ...]] = ("schedule",)

    layers: int = setting(1, "repeated blocks that train at a time")
    every: int = setting(50, "K, updates of one block", alias=("switch_every", "K"), least=1)
    order: Order = setting("descending", "in which blocks come: from the last, from the first, or "
                                         "drawn anew each round", alias=("switch_mode",))
    ends: bool = setting(False, "what stands outside the blocks trains too")
    seed: int = setting(0, "of the drawn order", beside={"order": "random"})

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks",)

    def optimizer(self) -> Rounding:
        return Rounding(kind="master", name="badam")

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        if not 1 <= self.layers <= len(anatomy.blocks):
            raise RecipeError(f"badam: layers={self.layers}, but this model has "
                              f"{len(anatomy.blocks)} repeated blocks, of which at least one "
                              "trains at a time")
        names = [n for n, owners in self._owned(anatomy) if owners or self.ends]
        for name in chosen(anatomy, self, names, siblings=False):
            yield Selection(name)

    @staticmethod
    def _owned(anatomy: Anatomy) -> Iterator[tuple[str, list[str]]]:
        """(name, the paths of the blocks that it is of, none if it is read outside) of every
        tensor of the model's own."""
        paths = [b.path for b in anatomy.blocks]
        spelt: dict[nn.Parameter, list[str]] = {}
        for name, p in anatomy.model.named_parameters(remove_duplicate=False):
            if p.is_floating_point() and ".burnish." not in f".{name}":
                spelt.setdefault(p, []).append(name)
        for names in spelt.values():
            of = [next((b for b in paths if n.startswith(f"{b}.")), "") for n in names]
            yield names[0], [] if "" in of else of

    def controller(self, tuned: Tuned) -> LiveBlocks:
        trained = dict(tuned.model.named_parameters())
        wanted = {n for n, _ in tuned.named_parameters()}
        groups: dict[str, list[nn.Parameter]] = {b.path: [] for b in tuned.anatomy.blocks}
        outside = []
        for name, owners in self._owned(tuned.anatomy):
            if name in wanted:
                for path in owners:
                    groups[path].append(trained[name])
                if not owners:
                    outside.append(trained[name])
        paths = [path for path, params in groups.items() if params]
        parts = {", ".join(some): [p for path in some for p in groups[path]]
                 for some in (paths[i : i + self.layers]
                              for i in range(0, len(paths), self.layers))}
        if outside:
            parts["outside"] = outside
        turns = InTurn(list(parts), self.every, self.order, self.seed)
        schedule = TrainableSchedule(parts, turns, optimizer=lambda: tuned.current_optimizer)
        return LiveBlocks(schedule, frozenset({"outside" if outside else next(iter(parts))}))
