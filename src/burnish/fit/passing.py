"""The passes of one micro-batch in fit: of all its rows, of some of them, of each alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import singly, taken
from ..core.errors import ConfigError
from ..core.outputs import next_token


class Passing:
    """What the trainer does around a forward and backward."""

    tuned: Any
    args: Any
    accelerator: Any
    compute_loss: Callable[..., Any]
    compute_loss_context_manager: Callable[[], Any]
    _prepare_inputs: Callable[[Any], Any]
    task: Any
    plain: bool
    eval_dataset: Any
    label_smoother: Any

    def _pass(self, own: Callable[..., Tensor], model: nn.Module, inputs: Any, items: Any
              ) -> torch.Tensor:
        """Forward and backward of one micro-batch, and what the recipe does around them. Probes
        are each process's own; only the pass itself is shared between processes.

        own: the trainer's forward and backward, of (model, inputs, items).
        """
        self._hold_out()
        def passes(inputs: Any, items: Any) -> Any:
            def whole() -> torch.Tensor:
                shared = not self.tuned.steps.still or self.args.world_size == 1
                with contextlib.nullcontext() if shared else self.accelerator.no_sync(model):
                    return own(model, dict(inputs), items)

            def alone() -> torch.Tensor:
                model.train()
                with self.compute_loss_context_manager():
                    return self.compute_loss(model, dict(self._prepare_inputs(inputs)), False,
                                             items)

            return whole, alone, lambda: (partial(own, model, dict(s), None)
                                          for s in singly(inputs))

        def some(rows: Sequence[int]) -> Any:
            fewer = taken(inputs, rows)
            return passes(fewer, None if items is None else items * share(
                self.tuned.model, inputs, fewer))

        scaler = self.accelerator.scaler
        return self.tuned.around(*passes(inputs, items),
                                 1.0 if scaler is None else scaler.get_scale(), some)

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """In evaluation mode, figures' and that of parts that look, the loss is the plain one and
        the model is given its labels: smoothing, which takes them away, is for what trains."""
        smoother = self.label_smoother
        if not self.tuned.model.training:
            self.label_smoother = None
        try:
            yield
        finally:
            self.label_smoother = smoother

    def _hold_out(self) -> None:
        """Parts that learn of validation rows (``hears``) are given them, before the first pass."""
        asking = [(n, h) for n, h in self.tuned.timeline.handlers if hasattr(h, "hears")]
        if not asking or getattr(self, "_held_out", None) is self.tuned.timeline:
            return
        if self.eval_dataset is None:
            raise ConfigError(f"{asking[0][0]} learns of validation rows, and this run has none: "
                              "leave validation=0 out, or give a validation split")
        for _, handler in asking:
            handler.hears(self._validation_batch)
        self._held_out = self.tuned.timeline

    def _validation_batch(self, k: int) -> tuple[Any, Any]:
        """The k-th batch of validation rows, in an order of the seed, as large as a micro-batch,
        with its loss (:meth:`burnish.fit.tasks.base.Task.call`)."""
        rows, size = self.eval_dataset, min(self.args.train_batch_size, len(self.eval_dataset))
        per = len(rows) // size
        g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + k // per)
        some = torch.randperm(len(rows), generator=g)[k % per * size:][:size].tolist()
        batch: tuple[Any, Any] = self.task.call(
            self._prepare_inputs(self.task.collate([rows[i] for i in some])), self.plain)
        return batch


def share(model: nn.Module, inputs: Any, fewer: Any) -> Tensor | float:
    """What part of a micro-batch's answers some of its rows have. The update's sum is divided by
    the answers of all micro-batches: by so much less, these rows weigh what theirs does."""
    def answers(labels: Tensor) -> Tensor:
        labels = labels[..., 1:] if next_token(model) else labels
        return (labels != -100).sum()

    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return 1.0
    return answers(fewer["labels"]).clamp_min(1) / answers(labels).clamp_min(1)
