"""Importance of parameters from their gradients, smoothed over steps."""

from __future__ import annotations

import torch
from torch import Tensor


def sensitivity(value: Tensor, grad: Tensor) -> Tensor:
    """``I = |theta * dtheta|``; what is not a number counts as zero."""
    return torch.nan_to_num((value.detach() * grad).abs().float(), nan=0.0)


def magnitude(value: Tensor, grad: Tensor) -> Tensor:
    """``I = |theta|``; the gradient has no say."""
    return torch.nan_to_num(value.detach().abs().float(), nan=0.0)


def factor_importance(W: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, scale: float,
                      panel: int = 1 << 22) -> tuple[Tensor, Tensor]:
    """(sum over each row (out,), over each column (in,)) of ``|G * (W + scale B A)|``.

    ``G = dB A + B dA - dB dA`` is the change of B A under a gradient step, the gradient of W as
    far as its factors know it; W (out, in), A (rank, in), B (out, rank). Rows are taken a panel at
    a time: nothing of size out x in is made.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    A, B, dA, dB = (t.detach().to(wide) for t in (A, B, dA, dB))
    rows, columns = W.new_empty(W.shape[0], dtype=wide), W.new_zeros(W.shape[1], dtype=wide)
    step = max(1, panel // W.shape[1])
    for i in range(0, W.shape[0], step):
        b, db = B[i : i + step], dB[i : i + step]
        G = torch.addmm(db @ A, b - db, dA)
        part = G.mul_(torch.addmm(W[i : i + step].detach().to(wide), b, A, alpha=scale)).abs_()
        rows[i : i + step] = part.sum(1)
        columns += part.sum(0)
    return rows, columns


class Smoothed:
    """Mean and uncertainty of an importance, elementwise (AdaLoRA, SNELLA).

    ``I' <- b1 I' + (1 - b1) I``, then ``U <- b2 U + (1 - b2) |I - I'|`` with the new I'; the score
    is I' U. Both start at zero. Holds two fp32 tensors of the parameter's shape.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85):
        self.beta1, self.beta2 = beta1, beta2
        self.mean: Tensor | None = None
        self.spread: Tensor | None = None

    @torch.no_grad()
    def update(self, importance: Tensor) -> None:
        if self.mean is None:
            self.mean = torch.zeros_like(importance)
            self.spread = torch.zeros_like(importance)
        self.mean.mul_(self.beta1).add_(importance, alpha=1 - self.beta1)
        self.spread.mul_(self.beta2).add_((importance - self.mean).abs_(), alpha=1 - self.beta2)

    def score(self) -> Tensor:
        if self.mean is None:
            raise RuntimeError("no importance has been seen yet")
        return self.mean * self.spread

    def state(self) -> dict[str, Tensor]:
        return {} if self.mean is None else {"mean": self.mean, "spread": self.spread}

    def load(self, state: dict[str, Tensor]) -> None:
        self.mean, self.spread = state.get("mean"), state.get("spread")
