"""Embeddings of one class close to each other, those of others apart.

    L_out,i = -1/|P(i)| sum_{p in P(i)} log q_ip        L_in,i = -log 1/|P(i)| sum_{p in P(i)} q_ip
    q_ip = exp(z_i.z_p / t) / sum_{a != i} exp(z_i.z_a / t)

z (N, D) of length one, P(i) the others of i's class (Khosla et al., 2020). By Jensen's inequality
L_in <= L_out; they are one where a class has two samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_anchor(h_ND: Tensor, classes_N: Tensor, temperature: float, outside: bool = True
               ) -> tuple[Tensor, Tensor]:
    """((N,) losses, (N,) whether the row has another of its class): 0 for a row that has none.
    h_ND is taken to length one; fp32 at least. outside: L_out, else L_in."""
    z = F.normalize(h_ND.to(torch.promote_types(h_ND.dtype, torch.float32)), dim=-1)
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (z @ z.t() / temperature).masked_fill(own, float("-inf"))
    logq = scores - scores.logsumexp(-1, keepdim=True)
    near = (classes_N.unsqueeze(0) == classes_N.unsqueeze(1)) & ~own
    many = near.sum(-1)
    if outside:
        loss = -logq.masked_fill(~near, 0.0).sum(-1) / many.clamp_min(1)
    else:                                   # a row without one is given itself, and then left out
        among = torch.where(many.unsqueeze(-1) > 0, near, ~own)
        loss = many.clamp_min(1).to(z.dtype).log() \
            - logq.masked_fill(~among, float("-inf")).logsumexp(-1)
    return torch.where(many > 0, loss, 0.0), many > 0


def supervised(h_ND: Tensor, classes_N: Tensor, temperature: float, outside: bool = True) -> Tensor:
    """The mean over the rows that have another of their class; 0 where none has."""
    losses, has = per_anchor(h_ND, classes_N, temperature, outside)
    return losses.sum() / has.sum().clamp_min(1)
