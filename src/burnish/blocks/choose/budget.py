"""Budgets: how much may be spent at a step, and who gets it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cubic(start: float, end: float, step: float, begin: float, finish: float) -> float:
    """``end + (start - end) (1 - (t - begin) / (finish - begin))^3``, constant outside."""
    if step <= begin:
        return start
    if step >= finish:
        return end
    return end + (start - end) * (1 - (step - begin) / (finish - begin)) ** 3


def elbow(curve: Tensor) -> int:
    """How many of these falling values stand up to the bend, it included: where the curve is
    farthest from the straight line between its ends. All of two or fewer, and of a straight line.
    """
    curve = curve / curve[0]
    line = torch.linspace(1.0, float(curve[-1]), curve.numel()).to(curve)
    return curve.numel() if torch.allclose(line, curve) else int((line - curve).abs().argmax()) + 1


def allocate(total: int, scores: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Whole shares of `total` in proportion to `scores`, none above its cap.

    Water filling: who would exceed its cap gets the cap, the rest is divided again among the
    others in proportion; what rounding leaves goes to the largest remainders. Python integers, so
    sums beyond 2^24 are exact and the loop ends after at most len(caps) rounds. All scores zero
    means equal scores. ``sum(result) == min(total, sum(caps))``.
    """
    total = min(int(total), sum(caps))
    weights = [max(0.0, float(s)) for s in scores]
    if not any(weights):
        weights = [1.0] * len(caps)
    share = [0] * len(caps)
    open_ = {i for i in range(len(caps)) if weights[i] > 0}
    left = total
    while open_:
        whole = sum(weights[i] for i in open_)
        full = [i for i in open_ if left * weights[i] / whole >= caps[i]]
        if not full:
            break
        for i in full:
            share[i] = caps[i]
        left = total - sum(share)
        open_ -= set(full)
    if open_:
        whole = sum(weights[i] for i in open_)
        exact = {i: left * weights[i] / whole for i in open_}
        for i in open_:
            share[i] = min(caps[i], int(exact[i]))
        rest = total - sum(share)
        for i in sorted(open_, key=lambda i: int(exact[i]) - exact[i]):
            if rest <= 0:
                break
            if share[i] < caps[i]:
                share[i] += 1
                rest -= 1
    rest = total - sum(share)
    for i in sorted(range(len(caps)), key=lambda i: -weights[i]):      # zero-score layers last
        give = min(rest, caps[i] - share[i])
        share[i] += give
        rest -= give
    return share

