"""Weights behind a mask that scores choose: ``W' = M * W``, M a mask of the scores S.

The gradient passes straight through the mask, as if M were S: ``dW = M * G``, ``dS = W * G``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..choose.lowest import lowest
from ..tape.functions import transformed


def straight(W: Tensor, S: Tensor, M: Tensor) -> Tensor:
    """``M * W`` for a mask M of truth values, with the gradient above."""
    if transformed():
        return M * W + (S - S.detach()) * W
    return _Straight.apply(W, S, M)


class _Straight(torch.autograd.Function):
    """Keeps W and M alone: of the scores nothing."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, S: Tensor, M: Tensor) -> Tensor:
        ctx.save_for_backward(W, M)
        return W * M

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        W, M = ctx.saved_tensors
        dW, dS = ctx.needs_input_grad[:2]
        return G * M if dW else None, G * W if dS else None, None


def most(S: Tensor, keep: int) -> Tensor:
    """Truth values: the `keep` largest of S, of equal ones those that come first."""
    return lowest(S.detach().flatten().neg(), keep).view(S.shape)
