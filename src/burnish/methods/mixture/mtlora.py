from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.another import beside
from ...blocks.weight.keyed import Tasked
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.recipe import make
from ...core.site import Branch, Place
from ...core.targets import match
from ..branch._sites import samples_first
from ..delta.lowrank.lora import check_dropout
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class MtLora(Method):
    """MTLoRA: a low-rank update for all tasks, and one of its own for each in the last blocks.

    ``y = W x + b + s B_0 A_0 drop(x) + s B_t A_t drop(x)``, t the sample's task: the batch names
    ``task``. A_0 (rank, in), B_0 (out, rank) on every linear; A (tasks, task_rank, in), B (tasks,
    out, task_rank) in the last block of every stage (of a model without stages: the last block).
    shared_last=False leaves the first out where the second stands, so that a task's last blocks
    hold nothing of the others'. s is used as it is, with no division by the rank. With tasks=0 it
    is a LoRA.

    Departure: the authors run every task on every picture, each as a stream of its own from the
    last blocks of a stage to a decoder, beside a stream for all that goes on to the next stage.
    Here a sample has one task and one stream, so what follows a stage's last block reads it too
    (shared_last=True is their "matrixv2" there, False their "matrix"; "addition", a norm of the
    sum of all tasks' streams, has none to sum). Norms, patch embeddings and
    whatever else trains beside it are parts of their own: ``mtlora + norms``.

    Start: A uniform in +-1/sqrt(in), B = 0: the pre-trained function exactly. Trains rank (in +
    out) per matrix and tasks task_rank (in + out) in last blocks, of which a sample moves its own
    task's. Kept for backward: x; the rest is made again there. Not mergeable (it follows the
    sample); :meth:`lifecycle` makes one task plain ``lora`` parts, which merge. No weight decay.
    """

    paper: ClassVar[str] = ("MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task "
                            "Learning (2024), arXiv:2403.20320")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    context: ClassVar[Mapping[str, Key]] = {"task": Key("one task id per sample", below="tasks")}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False

    rank: int = setting(64, "of the update for all tasks", alias=("r",))
    tasks: int = setting(2, "how many tasks")
    task_rank: int = setting(4, "rank of a task's own update")
    scale: float = setting(4.0, "s, what both are multiplied by")
    dropout: float = setting(0.05, "dropout on the input of A", alias=("lora_dropout",))
    shared_last: bool = setting(True, "the update for all tasks stands in last blocks too",
                                alias=("shared",))

    def __post_init__(self) -> None:
        check_dropout("mtlora", self.dropout)
        if self.tasks < 0 or self.task_rank < 1:
            raise RecipeError(f"{self}: expected tasks of 0 or more, and a task_rank above 0")

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.tasks else {}

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        if self.tasks:
            samples_first(anatomy, self)
        asked = wanted(anatomy, self)
        last = {_stage(b.path): b.path for b in anatomy.blocks}.values()
        for place, rows, out in linears(anatomy, self, match(anatomy) if asked is None else asked,
                                        samples=self.tasks > 0, rank=self.rank):
            own = self.tasks > 0 and anatomy.blocks[place.block or 0].path in last
            yield Branch(place.path, Tasked(
                place.inp, out, self.tasks, self.task_rank if own else 0,
                self.rank if self.shared_last or not own else 0, scale=self.scale,
                dropout=self.dropout, rows=rows), read=(place.path, "input"))

    def repeats(self) -> int | None:
        return None if self.tasks else 1

    def lifecycle(self, tuned: Any, task: int, name: str) -> None:
        """Settle one task: an adapter `name` beside the one in use (which must train this method),
        with a ``lora`` for it (of another rank in last blocks), and use that. It reads no key,
        merges and trains on. Raises RecipeError for a task that is none."""
        if not 0 <= task < max(1, self.tasks):
            raise RecipeError(f"mtlora has tasks 0 to {max(1, self.tasks) - 1}, not {task}")
        ranks: dict[int, dict[str, Any]] = {}
        for path, m in tuned.branches(Tasked):
            made = m.plain(task)
            ranks.setdefault(len(made["A"]), {})[path] = made
        beside(tuned, self, name, [
            (make("lora", {"rank": r, "alpha": float(r), "targets": list(made)}), made)
            for r, made in ranks.items()])

    def count(self, place: Place, last: bool = False) -> int:
        """Trainable parameters on one matrix, of a last block or of another."""
        own = self.tasks * self.task_rank if last else 0
        return ((self.rank if self.shared_last or not own else 0) + own) * (place.inp + place.out)


def _stage(block: str) -> str:
    """Blocks of one stage stand in one list."""
    return block.rpartition(".")[0]
