"""A router that asks more experts the less it knows: top-p, or all of them where entropy is high.

    S_q(p) = (1 - sum_e p_e^q) / (q - 1),      q = 1: - sum_e p_e log p_e

S > threshold: every expert answers, with weight p_e. Otherwise, in falling order of p, those answer
whose cumulative sum is at most top_p, and the first `always` in any case. Weights are p, not
renormalised: what the others would have had is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .experts import ExpertChains, counted


def tsallis(p: Tensor, q: float) -> Tensor:
    """S_q of the last dimension. Up to q = 1 a probability counts as at least 1e-5, below which its
    power has no gradient that a number could hold."""
    if q <= 1:
        p = p.clamp_min(1e-5)
    if q == 1:
        return -(p * p.log()).sum(-1)
    return (1 - p.pow(q).sum(-1)) / (q - 1)


def highest(experts: int, q: float) -> float:
    """S_q of the uniform distribution, which no other exceeds."""
    return float(tsallis(torch.full((experts,), 1 / experts, dtype=torch.float64), q))


def chosen(p: Tensor, q: float, threshold: float, top_p: float, always: int) -> Tensor:
    """(..., E) of bool: who answers. Equal probabilities are taken in order."""
    value, index = p.sort(stable=True, dim=-1, descending=True)
    some = value.cumsum(-1) <= top_p
    some[..., :always] = True
    if top_p >= 1:
        some.fill_(True)                         # a sum of all may be rounded up
    return torch.zeros_like(some).scatter(-1, index, some) | \
        (tsallis(p, q) > threshold).unsqueeze(-1)


class EntropicChains(ExpertChains):
    """Experts whose number follows the router's entropy; the tensors are ExpertChains' own.

    entropy, balance: weights of mean S_q(p) and of ``E sum_e mean(w_e) mean(p_e)``, w what is left
    of p; both means are over the tokens that count.
    """

    def __init__(self, inp: int, out: int, experts: int, rank: int, *, q: float, threshold: float,
                 top_p: float, always: int, entropy: float, balance: float, share: float = 1.0,
                 **kw: Any):
        super().__init__(inp, out, experts, rank, experts,
                         coefficient=share if entropy or balance else 0.0, **kw)
        self.rule = q, threshold, top_p, always
        self.weights = entropy, balance

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p, _ = super().gates(x)
        return p, p * chosen(p.detach(), *self.rule)

    def imbalance(self, p: Tensor, g: Tensor, x: Tensor) -> Tensor:
        valid = counted(x)
        p, g = p.flatten(0, -2), g.flatten(0, -2)
        m = torch.ones_like(p[:, :1]) if valid is None else valid.reshape(-1, 1).to(p.dtype)
        n = m.sum().clamp_min(1)
        entropy = (tsallis(p, self.rule[0]) * m[:, 0]).sum() / n
        even = p.shape[1] * ((g * m).sum(0) / n * ((p * m).sum(0) / n)).sum()
        return self.weights[0] * entropy + self.weights[1] * even
