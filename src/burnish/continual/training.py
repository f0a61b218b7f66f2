"""How each task of a stream is trained on: one loop for all learners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import ConfigError

if TYPE_CHECKING:
    from ..engine.tuned import Tuned


@dataclass(frozen=True)
class Training:
    """epochs, batch: of each task.  rate: the learning rate.  head_rate: a new head's own; None:
    `rate`.  decay: weight decay.  schedule: to zero within each task, or constant.
    max_grad_norm: gradients of an update are cut to it; None: never."""

    epochs: int = 5
    batch: int = 32
    rate: float = 3e-3
    head_rate: float | None = None
    decay: float = 0.0
    schedule: Literal["linear", "constant"] = "linear"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more")
        if not self.rate > 0 or not (self.head_rate is None or self.head_rate > 0):
            raise ConfigError(f"rate={self.rate}, head_rate={self.head_rate}: expected rates "
                              "above 0")
        if self.decay < 0:
            raise ConfigError(f"decay={self.decay}: expected 0 or more")
        if self.schedule not in ("linear", "constant"):
            raise ConfigError(f"schedule={self.schedule!r}: expected 'linear' or 'constant'")


def masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits in float32 or wider, with -inf where a class is not allowed: no log-softmax spends
    mass there, and no gradient reaches those columns. allowed: (classes,) or (rows, classes)."""
    if logits.dim() != 2 or logits.shape[1] != allowed.shape[-1]:
        raise ConfigError(f"the model answers {tuple(logits.shape)}, where (rows, "
                          f"{allowed.shape[-1]}) was expected: a head of {allowed.shape[-1]} "
                          "classes")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.masked_fill(~allowed.to(logits.device), -torch.inf)


def cross_entropy(logits: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
    """Its mean over rows, among the classes allowed."""
    return F.cross_entropy(masked(logits, allowed), labels.to(logits.device))


@dataclass(frozen=True)
class Given:
    """What a step is made of: the model's input, its labels, keys of context."""

    inputs: Any
    labels: Tensor
    keys: Mapping[str, Tensor]


Loss = Callable[[Tensor, Given], Tensor]


def batches(rows: Sequence[Any], size: int, seed: int) -> Iterator[list[Any]]:
    """All rows once, in an order of the seed; a last batch of one row joins the one before (norms
    of batches need two)."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=draw).tolist()
    cuts = list(range(0, len(order), size))
    if len(cuts) > 1 and len(order) - cuts[-1] == 1:
        cuts.pop()
    for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True):
        yield [rows[i] for i in order[a:b]]


def teach(tuned: Tuned, training: Training, make: Callable[[list[Any]], Given],
          read: Callable[[Any], Tensor], loss: Loss, rows: Sequence[Any], seed: int, *,
          head: Sequence[str] = (), epochs: int | None = None, keys: Sequence[str] = (),
          after: Callable[[], None] | None = None) -> None:
    """Train on rows with a fresh optimizer.

    make: rows -> a step.  read: what the model returns -> logits.  loss: of logits and the step.
    head: names of parameters with a rate of their own.  keys: of context that the recipe reads.
    after: called after every update.
    """
    epochs = training.epochs if epochs is None else epochs
    every = [list(batches(rows, training.batch, 10_007 * seed + e)) for e in range(epochs)]
    total = sum(map(len, every))
    tuned.total_steps = total
    for n, p in tuned.named_parameters():
        if n in head and training.head_rate is not None:
            p.burnish_lr = training.head_rate / training.rate     # type: ignore[attr-defined]
    words = {} if training.max_grad_norm is None else {"max_grad_norm": training.max_grad_norm}
    optimizer = tuned.optimizer(lr=training.rate, weight_decay=training.decay, **words)
    schedule = None if training.schedule == "constant" else \
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(0.0, 1 - n / total))
    tuned.model.train()

    def wanted(given: Given) -> Callable[[Any, Any], Tensor]:
        return lambda out, _: loss(read(out), given)

    for epoch in every:
        for some in epoch:
            given = make(some)
            with tuned.given(**{k: v for k, v in given.keys.items() if k in keys}):
                tuned.step((given.inputs, given.labels), loss=wanted(given))
            if after is not None:
                after()
            if schedule is not None:
                schedule.step()
