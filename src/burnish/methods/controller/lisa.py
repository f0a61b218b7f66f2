from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.update.live import Draw, LiveBlocks
from ...core.method import Method, setting
from ...core.site import Selection
from ._blocks import drawn, everything

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

    layers: int = setting(2, "gamma, blocks live at once; 0: the rest alone",
                        alias=("gamma",))
    every: int = setting(20, "K, updates between draws", alias=("period", "K"), least=1)
    seed: int = setting(0, "of the draws")
    state_on_leave: Literal["drop", "cpu", "keep"] = setting(
        "drop", "optimizer state of a block that leaves: freed, moved to the host, or kept")

    relies_on: ClassVar[tuple[str, ...]] = ("schedule",)

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks",)

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        return everything(self, self.layers, anatomy)

    def controller(self, tuned: Tuned) -> LiveBlocks:
        return drawn(tuned, lambda paths: Draw(paths, self.layers, self.every, self.seed),
                     self.state_on_leave)
