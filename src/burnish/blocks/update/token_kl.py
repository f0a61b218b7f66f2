"""The divergence of a student's words from a teacher's, a mean over the tokens that count.

    L = 1 / n sum_t KL(softmax(teacher_t) || softmax(student_t)),
    dL / dz_t = (softmax(z_t) - softmax(t_t)) / n

Kept for backward: the gradient, in the precision of the student's logits. In fp32 a few rows at a
time, whatever the size of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tape.functions import once_differentiable

#: rows of logits that exist in fp32 at once
ROWS = 256


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counts: Tensor | None) -> Tensor:
        z, t = student.flatten(0, -2), teacher.flatten(0, -2)
        wide = torch.promote_types(student.dtype, torch.float32)
        m = z.new_ones(len(z), dtype=wide) if counts is None else counts.flatten().to(wide)
        n, total = m.sum().clamp_min(1), z.new_zeros((), dtype=wide)
        g = torch.empty_like(z)
        for a in range(0, len(z), ROWS):
            at = slice(a, a + ROWS)
            q, p = (F.log_softmax(x[at].to(wide), 1) for x in (z, t))
            total += ((p.exp() * (p - q)).sum(1) * m[at]).sum()
            g[at] = (q.exp() - p.exp()) * (m[at] / n).unsqueeze(1)
        ctx.save_for_backward(g.view_as(student))
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        (g,) = ctx.saved_tensors
        return g * by.to(g.dtype), None, None


def token_kl(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """L of logits (..., V). counts: mask (...) of the tokens that do."""
    made: Tensor = _TokenKL.apply(student, teacher.detach(), counts)
    return made
