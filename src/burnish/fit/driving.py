"""What drives a loop and knows no trainer: an optimizer's stand-in, a schedule that goes on."""

from __future__ import annotations

import os
from typing import Any

import torch


class Driven(torch.optim.Optimizer):
    """Stands for an optimizer that :meth:`Tuned.step` drives: same groups, and nothing to do."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Always the inner's own: loading state gives it new ones, and a schedule writes here."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        """torch starts every optimizer with an empty list."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The inner has them already."""

    def step(self, closure: Any = None) -> None:
        pass


def go_on_by(scheduler: Any, kept: dict[str, Any]) -> None:
    """The schedule where it stood, with the rates that *this* run's settings give from there.

    A run that had ended and is given more steps, or another learning rate, would otherwise take its
    first step at the old end's rate, which is nought.
    """
    fresh = list(getattr(scheduler, "base_lrs", ()))
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        own = scheduler.lr_lambdas               # one a group; other shares, other groups
        if len(kept.get("lr_lambdas", own)) != len(own):
            kept = {**kept, "lr_lambdas": [None] * len(own)}
    scheduler.load_state_dict(kept)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return
    scheduler.base_lrs = fresh
    rates = [base * shape(scheduler.last_epoch)
             for base, shape in zip(fresh, scheduler.lr_lambdas, strict=True)]
    for group, base, rate in zip(scheduler.optimizer.param_groups, fresh, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    scheduler._last_lr = rates


class Smoothed:
    """The smoothed loss of transformers through ``cross_entropy``, which needs no log-probabilities
    of the whole vocabulary beside the logits, or no logits (blocks/tape/unmade.py)."""

    ignore_index = -100

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def __call__(self, model_output: Any, labels: torch.Tensor, shift_labels: bool = False,
                 num_items_in_batch: Any = None) -> torch.Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        total = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum",
            ignore_index=self.ignore_index, label_smoothing=self.epsilon)
        items = (labels != self.ignore_index).sum() if num_items_in_batch is None \
            else torch.as_tensor(num_items_in_batch, device=total.device)
        return total / items


def quiet_libraries() -> None:
    """transformers speaks through us: its own bars and load reports would interleave."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class Compared:
    """A trainer that lets go of labels as soon as answers have been compared with them, where all
    of them together would fill the memory (:attr:`Task.heavy`), and that lets a model write where
    figures are of that (:attr:`Task.writes`)."""

    task: Any

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kw: Any
                        ) -> tuple[Any, Any, Any]:
        trainer: Any = super()
        loss, logits, labels = trainer.prediction_step(model, inputs, *args, **kw)
        if logits is None or not (self.task.heavy or self.task.writes):
            return loss, logits, labels
        if self.task.writes:
            with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                made = self.task.looked(
                    model, self._prepare_inputs(inputs), logits)  # type: ignore[attr-defined]
        else:
            made = self.task.kept(logits, labels)
        return loss, made, self.task.told(labels)


def kept_of(task: Any) -> Any:
    """What a trainer keeps of logits when all are there; None where :class:`Compared` has kept it.
    """
    return None if task.heavy or task.writes else task.kept
