"""Embeddings of one class close to each other, those of others apart.

    L_out,i = -1/|P(i)| sum_{p in P(i)} log q_ip        L_in,i = -log 1/|P(i)| sum_{p in P(i)} q_ip
    q_ip = exp(z_i.z_p / t) / sum_{a != i} exp(z_i.z_a / t)

z (N, D) of length one, P(i) the others of i's class (Khosla et al., 2020). By Jensen's inequality
L_in <= L_out; they are one where a class has two samples.

    L_hard,i = max(max_{p in P(i)} |z_i - z_p|^2 - min_{n not of i's class} |z_i - z_n|^2 + m, 0)

the triplet of the farthest of i's class and the nearest stranger (Hermans et al., 2017).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALL = slice(None)


def beside(h_ND: Tensor, classes_N: Tensor, rows: slice = ALL) -> tuple[Tensor, Tensor, Tensor]:
    """(cosines, whether it is the row itself, whether it is another of its class), each of the A
    `rows` beside all N: (A, N). h_ND is taken to length one; fp32 at least."""
    z = F.normalize(h_ND.to(torch.promote_types(h_ND.dtype, torch.float32)), dim=-1)
    at = torch.arange(len(z), device=z.device)
    own = at[rows].unsqueeze(1) == at
    return z[rows] @ z.t(), own, (classes_N[rows].unsqueeze(1) == classes_N) & ~own


def per_anchor(h_ND: Tensor, classes_N: Tensor, temperature: float, outside: bool = True,
               rows: slice = ALL) -> tuple[Tensor, Tensor]:
    """((A,) losses of the A `rows`, (A,) whether the row has another of its class): 0 for a row
    that has none. outside: L_out, else L_in."""
    cos, own, near = beside(h_ND, classes_N, rows)
    scores = (cos / temperature).masked_fill(own, float("-inf"))
    logq = scores - scores.logsumexp(-1, keepdim=True)
    many = near.sum(-1)
    if outside:
        loss = -logq.masked_fill(~near, 0.0).sum(-1) / many.clamp_min(1)
    else:                                   # a row without one is given itself, and then left out
        among = torch.where(many.unsqueeze(-1) > 0, near, ~own)
        loss = many.clamp_min(1).to(cos.dtype).log() \
            - logq.masked_fill(~among, float("-inf")).logsumexp(-1)
    return torch.where(many > 0, loss, 0.0), many > 0


def hardest(h_ND: Tensor, classes_N: Tensor, margin: float, rows: slice = ALL
            ) -> tuple[Tensor, Tensor]:
    """((A,) losses L_hard of the A `rows`, (A,) whether the row has another of its class and a
    stranger): 0 for a row that has not."""
    cos, own, near = beside(h_ND, classes_N, rows)
    far = 2 - 2 * cos
    strange = ~near & ~own
    has = near.any(-1) & strange.any(-1)
    worst = far.masked_fill(~near, float("-inf")).amax(-1)
    best = far.masked_fill(~strange, float("inf")).amin(-1)
    apart = torch.where(has, worst, 0.0) - torch.where(has, best, 0.0)
    return torch.where(has, (apart + margin).clamp_min(0), 0.0), has


def supervised(h_ND: Tensor, classes_N: Tensor, temperature: float, outside: bool = True) -> Tensor:
    """The mean over the rows that have another of their class; 0 where none has."""
    losses, has = per_anchor(h_ND, classes_N, temperature, outside)
    return losses.sum() / has.sum().clamp_min(1)
