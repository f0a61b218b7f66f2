from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.update.live import Draw, TrainableSchedule
from ...core.errors import RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Lisa(Method):
    """LISA: embedding, head and final norm always train, and `layers` blocks drawn at random.

        every K updates, from the first:  live = gamma of the L blocks, without replacement

    Live at once: n_E + n_H + n_norm + gamma n_block (LLaMA-7B, gamma 2: 666.9 M of 6,738 M); the
    rest has no gradient and no optimizer state. Kept for backward: a frozen linear keeps no
    input. A block that leaves the set loses its gradient and its optimizer state, without which
    every block would soon have moments and nothing would be saved (the published callback only
    toggles requires_grad). Start is the pre-trained function.

    The draw of a period depends on the seed and its number alone: the same on every rank, and
    after a resume. A tensor that a block shares with the outside is always live.
    """

    paper: ClassVar[str] = ("LISA: Layerwise Importance Sampling for Memory-Efficient Large "
                            "Language Model Fine-Tuning, NeurIPS 2024")
    excused: ClassVar[dict[str, str]] = {
        f"exactly_what_trains_moves on {model}": "six draws of one block in four leave one out; "
        "tests/methods/test_lisa.py" for model in ("clip", "t5", "whisper")}
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})

    layers: int = setting(2, "gamma, blocks live at once", alias=("gamma",))
    every: int = setting(20, "K, updates between draws", alias=("period", "K"))
    seed: int = setting(0, "of the draws")
    state_on_leave: Literal["drop", "cpu", "keep"] = setting(
        "drop", "optimizer state of a block that leaves: freed, moved to the host, or kept")

    relies_on: ClassVar[tuple[str, ...]] = ("schedule",)

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks",)

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        if not 0 <= self.layers <= len(anatomy.blocks):
            raise RecipeError(f"lisa: layers={self.layers}, but this model has "
                              f"{len(anatomy.blocks)} repeated blocks to draw from")
        for name, p in anatomy.model.named_parameters():
            if p.is_floating_point() and ".burnish." not in f".{name}":
                yield Selection(name)

    def controller(self, tuned: Tuned) -> LiveBlocks:
        paths = [b.path for b in tuned.anatomy.blocks]
        named = [(n, p) for n, p in tuned.model.named_parameters(remove_duplicate=False)
                 if p.is_floating_point() and ".burnish." not in f".{n}"]
        outside = {id(p) for n, p in named if not any(n.startswith(f"{b}.") for b in paths)}
        groups = {b: [p for n, p in named if n.startswith(f"{b}.") and id(p) not in outside]
                  for b in paths}
        return LiveBlocks(TrainableSchedule(
            groups, Draw(paths, self.layers, self.every, self.seed),
            optimizer=lambda: tuned.current_optimizer, state_on_leave=self.state_on_leave))


@dataclass(frozen=True)
class LiveBlocks:
    """Asks the schedule before every step; early, so that other handlers see what is live."""

    schedule: TrainableSchedule
    phase: ClassVar[int] = EARLY

    def step_begin(self, step: int) -> None:
        self.schedule.update(step)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)
