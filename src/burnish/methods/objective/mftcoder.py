from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.state.taps import evaluating
from ...blocks.update.by_task import Counts, balanced, counts, nll, of_each
from ...blocks.update.converging import Coba, Famo, Following, Whole
from ...core.call import giving
from ...core.errors import ConfigError, RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.outputs import next_token
from ...core.processes import processes
from .distill import logits_of

if TYPE_CHECKING:
    from ...core.protocols import Tuned

_LONG = "weights move after some updates: tests/methods/test_mftcoder.py"
#: the settings of the cases whose weights move
_OF = {"coba": ("warmup", "remembered", "alarm"), "famo": ("weight_rate", "evening")}
#: what `lifecycle` tells each micro-batch of the whole update
WHOLE = "mftcoder counts"


@dataclass(frozen=True, kw_only=True)
class MftCoder(Method):
    """MFTCoder: several tasks in a batch, each with the same say however long its answers are.

    With l_ijk the cross-entropy of target k of sample j of task i (the batch names ``task``), the
    loss is, by `case`:

        case1        mean over all targets               (what a plain loss is)
        case2        mean over samples of (1/T_ij) sum_k l_ijk
        case3        (1/N) sum_i (sum_jk l_ijk / sum_j T_ij)
        case4        (1/N) sum_i (1/M_i) sum_j (1/T_ij) sum_k l_ijk
        focal        (1/N) sum_i (1/M_i) sum_j (1 - P_ij)^focus (-Q_ij)
        task_focal   (1/N) sum_i (1 - P_i)^focus (-Q_i)
        famo, coba   case3 with task weights that follow how the tasks' losses fall, so that they
                     converge together (blocks/update/converging.py has both equations)

    P, Q means of p and log p over a sample's (a task's) targets; the factor is part of the
    gradient. N counts the tasks that are there; with `task_weights` w the mean is ``sum_i w_i l_i /
    sum_i w_i`` over those. It is a term beside the model's loss: ``loss + (case - mean over
    targets)``, so that what backward sees is the case, and whatever else the model's loss holds
    stays; the loss that is told is the model's own.

    An update of several micro-batches divides by its own counts of each task, which only all of
    them together say: ``method.lifecycle(tuned, micro_batches)`` goes backward through them; a loop
    that accumulates by itself is stopped before its first update, and so are several processes.
    Pack samples of one task alone.

    famo and coba weigh an update by the losses told before it: those of validation batches that
    ``method.validate(tuned, batch)`` is given, and until one is, those of the batches that trained,
    as they were before their updates. A task that is not there keeps its last loss; all weights are
    equal until each task has had one. The weights are in what a run tells (``mftcoder``).

    Trains nothing of its own. Kept for backward: the logits, which the model's own loss keeps.
    Ours: that focal losses are means (the text writes sums with factors of the tasks), focus = 2;
    famo's logits take plain steps, not Adam's; coba's weights are ``DF RCS + (1 - DF) ACS`` without
    the softmax and the least weight that the published code puts behind them.
    """

    paper: ClassVar[str] = ("MFTCoder: Boosting Code LLMs with Multitask Fine-Tuning (2023), "
                            "arXiv:2311.02303")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "own loss"})
    context: ClassVar[Mapping[str, Key]] = {
        "task": Key("one task id per sample", below="tasks", training=True)}
    sees_run: ClassVar[bool] = True

    case: Literal["case1", "case2", "case3", "case4", "focal", "task_focal", "famo", "coba"] = \
        setting("case3", "what the loss is a mean over", alias=("weighted_loss_mode",))
    tasks: int = setting(2, "how many tasks", other=(3,))
    task_weights: tuple[float, ...] | None = setting(None, "of the tasks; None: equal",
                                                     other=((1.0, 3.0),))
    focus: float = setting(2.0, "exponent of focal losses", beside={"case": "focal"})
    warmup: int = setting(100, "updates with equal weights", alias=("coba_warmup_steps",),
                          unseen=_LONG, beside={"case": "coba"})
    remembered: int = setting(200, "losses, and slopes of them, that are looked at", unseen=_LONG,
                              alias=("coba_history_length",), beside={"case": "coba"})
    alarm: float = setting(5.0, "tau, of the answer to a loss that turns up", unseen=_LONG,
                           alias=("coba_tau",), beside={"case": "coba"})
    weight_rate: float = setting(0.025, "of the steps of the weights' logits",
                                 beside={"case": "famo"})
    evening: float = setting(0.001, "of the weights towards equal ones",
                             beside={"case": "famo"})

    def __post_init__(self) -> None:
        w = self.task_weights
        if self.tasks < 1 or self.focus < 0 or w is not None and (
                len(w) != self.tasks or min(w) < 0 or sum(w) <= 0):
            raise RecipeError(f"{self}: expected a task or more, a weight of at least 0 for each, "
                              "and a focus of 0 or more")
        if "focus" in self.changed() and "focal" not in self.case:
            raise RecipeError(f"mftcoder: focus does nothing beside case={self.case!r}")
        if w is not None and self.case in ("case1", "case2", *_OF):
            raise RecipeError(f"mftcoder: task_weights do nothing beside case={self.case!r}")
        for case, names in _OF.items():
            if self.case != case and (said := [n for n in names if n in self.changed()]):
                raise RecipeError(f"mftcoder: {said[0]} does nothing beside case={self.case!r}; "
                                  f"expected case={case!r}")
        if self.remembered < 2 or min(self.warmup, self.alarm, self.weight_rate, self.evening) < 0:
            raise RecipeError(f"{self}: expected 2 or more losses that are remembered, and a "
                              "warmup, alarm, weight_rate and evening of at least 0")

    def controller(self, tuned: Tuned) -> Whole:
        if processes() > 1:
            raise ConfigError("mftcoder divides by what an update has of each task, and each of "
                              f"{processes()} processes sees its own part: use one")
        if self.case == "coba":
            return Following(self.tasks, Coba(self.tasks, self.warmup, self.remembered,
                                              self.alarm))
        if self.case == "famo":
            return Following(self.tasks, Famo(self.tasks, self.weight_rate, self.evening))
        return Whole()

    def objective(self, tuned: Any, run: Any) -> Iterator[Tensor]:
        labels, task = self.read(tuned, run.batch, run.given["task"])
        each, own = self.each(run.outputs, labels), counts(labels, task, self.tasks)
        whole, watch = run.given.get(WHOLE), self.watch(tuned)
        if whole is None:
            watch.saw(run.batch)
        how = {"case1": "tokens", "case2": "samples", "case4": "task samples", "focal": "focal",
               "task_focal": "task focal"}.get(self.case, "task tokens")
        said: Sequence[float] | None = self.task_weights
        if isinstance(watch, Following):
            watch.trained(run.batch, of_each(each.detach(), labels, task, self.tasks), own.targets)
            said = watch.weights
        w = None if said is None else torch.tensor(said, device=each.device)
        yield balanced(each, labels, task, how, own if whole is None else whole, w, self.focus) \
            - balanced(each, labels, task, "tokens", own)

    def watch(self, tuned: Any) -> Whole:
        """What its controller is in this handle."""
        return next(h for _, h in tuned.timeline.handlers if isinstance(h, Whole))

    def each(self, outputs: Any, labels: Tensor) -> Tensor:
        """The cross-entropy of every target."""
        logits = logits_of(outputs, self.name)
        if labels.shape != logits.shape[:-1]:
            raise ConfigError(f"mftcoder: labels {tuple(labels.shape)} do not fit logits "
                              f"{tuple(logits.shape)}")
        return nll(logits, labels)

    @torch.no_grad()
    def validate(self, tuned: Any, batch: Mapping[str, Any]) -> None:
        """The tasks' losses on a validation batch, which the next update is weighed by. From the
        first on, batches that train tell none. ConfigError for a case whose weights do not move."""
        watch = self.watch(tuned)
        if not isinstance(watch, Following):
            raise ConfigError(f"mftcoder(case={self.case!r}) has weights that do not move; "
                              "expected case='famo' or case='coba'")
        labels, task = self.read(tuned, batch, batch["task"])
        with evaluating(list(tuned.model.modules())):
            each = self.each(tuned.model(**batch), labels)
        watch.told_by(of_each(each, labels, task, self.tasks),
                      counts(labels, task, self.tasks).targets)

    def read(self, tuned: Any, batch: Any, task: Any) -> tuple[Tensor, Tensor]:
        """The labels as the logits' rows answer them, and each sample's task."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.dim():
            raise ConfigError("mftcoder takes the loss apart by labels of whole numbers: expected "
                              "a batch with 'labels'")
        if next_token(tuned.model):
            labels = F.pad(labels[..., 1:], (0, 1), value=-100)
        ids = torch.as_tensor(task, device=labels.device).flatten()
        return labels, ids.expand(len(labels)).long()

    def lifecycle(self, tuned: Any, batches: Sequence[Mapping[str, Any]],
                  loss: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """Forward and backward of all micro-batches of one update; what they add to ``.grad`` is
        that of one batch of them all. The mean of the model's own losses. ConfigError for
        case="task_focal", which is no sum over batches."""
        if self.case == "task_focal" and len(batches) > 1:
            raise ConfigError("mftcoder(case='task_focal') is a function of means over the whole "
                              "update, no sum over micro-batches: give one batch")
        each: list[Counts] = [counts(*self.read(tuned, b, b["task"]), self.tasks) for b in batches]
        with giving(tuned.state, {WHOLE: reduce(add, each)}):
            return torch.stack([tuned.backward(b, loss) for b in batches]).mean()
