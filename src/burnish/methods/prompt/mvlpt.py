from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ...blocks.state.generators import Side, Unified
from ...blocks.state.placed import ByTask, Placed
from ...blocks.state.prompts import Tokens
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import refuse, towers, unmet
from ._stacks import states_as_they_were

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Mvlpt(Method):
    """MVLPT: one prompt for many tasks at once, and each new task goes on from it.

    Stage 1: the texts are the classes of all tasks, one task after the other (`per_task`: how many
    each has), the batch names the ``task`` of every image, and of an image's logits those of its
    own task's classes are left: the loss is a sum of the tasks'. Stage 2: the same without
    `per_task`, begun where stage 1 ended (``init_from``, see `pvp`).

    `where`: the prompt is a context in the place of a text's placeholders ("text", as `coop`),
    tokens behind the pictures' patches, carried on ("visual", as `vpt` does it shallow), "both", or
    "unified" (UPT): U_T (length, d_t) and U_V (length, d_v) are brought to one width, `hidden`,
    look at each other in one transformer block of one head, and what comes out, brought back, is
    the rows of both. Nothing of that follows the input: a finished file (``tuned.save``) holds the
    rows, as of "both".

    Start: rows N(0, 0.02^2), linears as they start; never the pre-trained function. Trains length
    d_t (8,192 with the defaults and where="text" at 512), length d_v, both, or with w = hidden also
    (d_t + d_v) (2 w + 1) + 12 w^2 + 15 w. Kept for backward: the towers' that have rows. Not
    mergeable. Unconfirmed: of the transformer the text says layers and heads, its norms are ours.
    """

    paper: ClassVar[str] = "Multitask Vision-Language Prompt Tuning (2022), arXiv:2211.11720"
    tier: ClassVar[str] = "from the text"
    needs: ClassVar[frozenset[str]] = frozenset({"two towers"})
    context: ClassVar[Mapping[str, Key]] = {"task": Key("one task id per image", below="tasks")}
    of_task: ClassVar[frozenset[str]] = frozenset({"per_task"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    length: int = setting(16, "rows of a side", alias=("n_ctx",))
    where: Literal["unified", "text", "visual", "both"] = setting("unified", "where rows stand")
    hidden: int = setting(128, "width in which both sides meet", other=(4, 6))
    per_task: tuple[int, ...] | list[int] = setting(
        (), "how many classes each task has; none: one task",
        unseen="a small model's own loss is contrastive: tests/methods/test_mvlpt.py")

    def __post_init__(self) -> None:
        if min(self.length, self.hidden, *self.per_task) < 1:
            raise RecipeError(f"mvlpt(length={self.length}, hidden={self.hidden}, per_task="
                              f"{self.per_task}): expected a row, a width and classes of 1 or more")
        if self.where != "unified" and self.hidden != Mvlpt.hidden:
            raise RecipeError(f"mvlpt: hidden={self.hidden} is the width in which both sides meet, "
                              f"and with where={self.where!r} they do not: leave one of them out")

    @property
    def tasks(self) -> int:
        """How many there are."""
        return max(1, len(self.per_task))

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.per_task else {}

    def prompt(self, anatomy: Anatomy) -> Mvlpt:
        if self.targets is not None:
            raise RecipeError("mvlpt takes no targets: it stands where both towers begin")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        two, state, name = towers(attacher.anatomy), attacher.state, attacher.adapter.name
        d, out = attacher.model.get_submodule(two.table).embedding_dim, two.vision[0].hidden_size
        n, text, visual = self.length, None, None
        if self.where == "unified":
            bank = Unified(n, (d, out), self.hidden)
            text, visual = Side(bank, 0, True), Side(bank, 1, False)
        if self.where != "visual":
            rows = None if text else torch.randn(n, d) * 0.02
            Placed(state, name, rows, maker=text).to(attacher.device(two.table)).listen(
                attacher.slot(two.table), part.name)
        for block in two.vision if self.where != "text" else ():
            first, last = block is two.vision[0], block is two.vision[-1]
            rows = torch.randn(n, out) * 0.02 if first and visual is None else None
            Tokens(state, name, n, rows, after=None, enter=first, leave=last,
                   maker=visual if first else None).to(attacher.device(block.path)).listen(
                       attacher.slot(block.path), part.name)
        if self.where != "text":
            states_as_they_were(attacher, part, two.vision[0].stack, n, None)
        if self.per_task:
            ByTask(state, name, self.per_task).to(attacher.device(two.table)).listen(
                attacher.slot(""), f"{part.name}_tasks")

    def finished(self) -> Mvlpt:
        return replace(self, where="both", hidden=Mvlpt.hidden) if self.where == "unified" else self

    def count(self, d: int, out: int) -> int:
        """Trainable parameters at text width d, pictures of width `out`."""
        w, sides = self.hidden, {"text": d, "visual": out}.get(self.where, d + out)
        made = (d + out) * (2 * w + 1) + 12 * w * w + 15 * w if self.where == "unified" else 0
        return self.length * sides + made
