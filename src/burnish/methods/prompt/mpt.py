from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from ...blocks.state.another import beside
from ...blocks.state.task_prompts import TaskRows
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.recipe import make
from .prompt_tuning import PromptTuning


@dataclass(frozen=True, kw_only=True)
class Mpt(PromptTuning):
    """MPT: one prompt that tasks share, and a low-rank factor of it for each.

    ``X' = [P_t; E(x)]``, ``P_t = P * (U_t V_t)`` entry by entry: P (length, d) shared, U_t (length,
    rank) and V_t (rank, d) the task's, t the sample's task: the batch names ``task``. With one task
    no key is read. All else is `prompt_tuning`'s: mask, positions, cache, encoder-decoders.

    :meth:`lifecycle` makes of a trained prompt what comes next: a task's own ``prompt_tuning``, or
    an ``mpt`` for one new task, begun at the shared rows and the mean of the tasks' factors, which
    is how the paper goes to a target task.

    Start: P as in `prompt_tuning`; U_t V_t is 1, so every task has P (unconfirmed; PEFT draws both
    at 0.02, so that its prompt begins as next to nothing). Never the pre-trained function. Trains
    length d + tasks rank (length + d). Kept for backward: what frozen blocks keep, for `length`
    more tokens, and the rows of each sample. Not mergeable. The paper's other half, source prompts
    trained task by task whose models then teach this one, is a run of `distill` for each.
    """

    paper: ClassVar[str] = ("Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning "
                            "(2023), arXiv:2303.02861")
    tier: ClassVar[str] = "checked against an independent equation"
    context: ClassVar[Mapping[str, Key]] = {"task": Key("one task id per sample", below="tasks")}

    tasks: int = setting(2, "how many tasks", alias=("num_tasks",))
    rank: int = setting(1, "of a task's factor", alias=("num_ranks",))

    def __post_init__(self) -> None:
        if min(self.rank, self.tasks) < 1:
            raise RecipeError(f"mpt(tasks={self.tasks}, rank={self.rank}): expected a task and a "
                              "rank of at least 1")

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.tasks > 1 else {}

    def listener(self, state: Any, name: str, rows: Tensor, causal: bool, stay: bool) -> TaskRows:
        return TaskRows(state, name, rows, causal, stay, self.tasks, self.rank)

    def lifecycle(self, tuned: Any, task: int | None, name: str,
                  then: Literal["prompt_tuning", "mpt"] = "prompt_tuning") -> None:
        """Add an adapter `name` beside the one in use (which must train this method), and use it.

        "prompt_tuning": the rows of this task alone, which need no key. "mpt": a prompt for one
        task, of which all trains. Both begin at this task's factors, or (None) at the mean of all,
        as for a task never seen. Raises RecipeError for a task that is none.
        """
        if task is not None and not 0 <= task < self.tasks:
            raise RecipeError(f"mpt has tasks 0 to {self.tasks - 1}, not {task}; None is one of "
                              "its own")
        (path, rows), = ((f".{n}".partition(".burnish.")[0][1:], m)
                         for n, m in tuned.model.named_modules()
                         if isinstance(m, TaskRows) and m.adapter == tuned.training)
        other: Method
        if then == "prompt_tuning":
            made = rows.plain(task)
            other = make("prompt_tuning", {"length": self.length, "init": "normal"})
        elif then == "mpt":
            made, other = rows.for_one(task), replace(self, tasks=1)
        else:
            raise RecipeError(f"mpt becomes 'prompt_tuning' or 'mpt', not {then!r}")
        beside(tuned, self, name, [(other, {path: made})])

    def count(self, d: int) -> int:
        """Trainable parameters at embedding width d."""
        return self.length * d + self.tasks * self.rank * (self.length + d)
