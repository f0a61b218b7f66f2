"""Losses of several tasks in one batch, each with a say of its own.

    l_ijk = -log p of target k of sample j of task i       T_ij targets, M_i samples, N tasks

    tokens        sum_ijk l / sum_ij T_ij
    samples       mean_ij (1/T_ij) sum_k l
    task tokens   mean_i (sum_jk l / sum_j T_ij)
    task samples  mean_i (1/M_i) sum_j (1/T_ij) sum_k l
    focal         mean_i (1/M_i) sum_j (1 - P_ij)^g (-Q_ij)      P, Q: means over k of p, log p
    task focal    mean_i (1 - P_i)^g (-Q_i)                      means over the task's targets

A mean over tasks is of those that are there, by their weights: ``sum_i w_i l_i / sum_i w_i``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tape.executor import checkpoint

#: rows of logits whose softmax exists at a time
ROWS = 1024
_NOTHING = nn.Module()                           # what is run again has no parameters of its own


def _rows(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), y, reduction="none",
                           ignore_index=-100)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each label (...,), 0 where it is -100; of the logits (..., classes) nothing is kept
    for backward beside themselves."""
    z, y = logits.flatten(0, -2), labels.flatten()
    parts = [checkpoint(_NOTHING, _rows, (a, b), {})
             for a, b in zip(z.split(ROWS), y.split(ROWS), strict=True)]
    return torch.cat(parts).view(labels.shape)


@dataclass(frozen=True)
class Counts:
    """targets (tasks,) and samples (tasks,) that an update has of each task; a sample without a
    target is none."""

    targets: Tensor
    samples: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.targets + other.targets, self.samples + other.samples)


def counts(labels: Tensor, task: Tensor, tasks: int) -> Counts:
    """Of one batch: labels (samples, ...), task (samples,)."""
    each = (labels.flatten(1) if labels.dim() > 1 else labels.unsqueeze(1)).ne(-100).sum(1)
    zero = torch.zeros(tasks, dtype=torch.float64, device=labels.device)
    return Counts(zero.index_add(0, task, each.double()),
                  zero.index_add(0, task, each.gt(0).double()))


def of_each(each: Tensor, labels: Tensor, task: Tensor, tasks: int) -> Tensor:
    """(tasks,) sums of the losses of a batch's targets."""
    each, labels = (t.flatten(1) if t.dim() > 1 else t.unsqueeze(1) for t in (each, labels))
    rows = (each * labels.ne(-100)).sum(1).double()
    return rows.new_zeros(tasks).index_add(0, task, rows)


def balanced(each: Tensor, labels: Tensor, task: Tensor, how: str, of: Counts,
             weights: Tensor | None = None, focus: float = 2.0) -> Tensor:
    """The loss of a batch, or its part of the loss of an update with `of` targets and samples: the
    parts of its batches add up to it (but for "task focal", whose means are of one batch).

    each, labels (samples, ...), task (samples,). weights (tasks,) of the tasks; None: equal ones.
    """
    each, labels = (t.flatten(1) if t.dim() > 1 else t.unsqueeze(1) for t in (each, labels))
    on = labels.ne(-100).to(each.dtype)
    T = on.sum(1).clamp_min(1)
    targets, samples = of.targets.to(each.dtype), of.samples.to(each.dtype)
    if how == "tokens":
        return (each * on).sum() / targets.sum().clamp_min(1)
    if how == "samples":
        return ((each * on).sum(1) / T).sum() / samples.sum().clamp_min(1)
    there = samples.gt(0).to(each.dtype)
    w = there if weights is None else there * weights.to(each.dtype)
    w = w / w.sum().clamp_min(torch.finfo(each.dtype).tiny)

    def of_tasks(rows: Tensor) -> Tensor:
        return torch.zeros_like(w).index_add(0, task, rows)

    if how == "task tokens":
        return (w * of_tasks((each * on).sum(1)) / targets.clamp_min(1)).sum()
    if how == "task samples":
        return (w * of_tasks((each * on).sum(1) / T) / samples.clamp_min(1)).sum()
    p = (-each).exp() * on
    if how == "focal":
        rows = (1 - p.sum(1) / T).clamp_min(0).pow(focus) * (each * on).sum(1) / T
        return (w * of_tasks(rows) / samples.clamp_min(1)).sum()
    P, Q = (of_tasks(x.sum(1)) / targets.clamp_min(1) for x in (p, each * on))
    return (w * (1 - P).clamp_min(0).pow(focus) * Q).sum()
