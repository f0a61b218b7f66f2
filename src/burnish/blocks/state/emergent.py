"""The experts that a dense MLP has already: inner channels whose keys are alike.

The F rows of the first matrix (of the gate, where there is one), each of length one, fall into E
clusters of F / E. A token takes the k clusters whose mean row, as it stood, it is nearest to:

    score_e = x . mean_{j in e} W1_j        y = sum_{e in top-k} W2_e act(W1_e x + b1_e) + b2
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.followed import is_fake
from ..tape.cast import uncast
from .routed import Routed, Routing, dealt

#: rounds after which clusters are taken as they are
ROUNDS = 1000


def assigned(likes: Tensor, each: int) -> Tensor:
    """(F,): a cluster for every row of likes (F, E), `each` of them in every one. The largest
    entries are served first; where a cluster is full, the next best has the row."""
    rows, E = likes.shape
    labels = torch.full((rows,), -1, dtype=torch.long, device=likes.device)
    room = torch.full((E,), each, dtype=torch.long, device=likes.device)
    while (free := (labels < 0).nonzero().flatten()).numel():
        value, best = likes[free].masked_fill(room == 0, -torch.inf).max(1)
        order = value.argsort(descending=True, stable=True)
        best, free = best[order], free[order]
        mine = F.one_hot(best, E)
        place = (mine.cumsum(0) * mine).sum(1) - 1         # among those who want the same one
        take = place < room[best]
        labels[free[take]] = best[take]
        room -= torch.bincount(best[take], minlength=E)
    return labels


def clusters(keys: Tensor, experts: int, seed: int) -> Tensor:
    """(F,): the rows of keys (F, d) cluster by cluster, F / experts in each: k-means on rows of
    length one, where every round gives each mean as many. Rows keep their order within a cluster.
    """
    P = F.normalize(keys.detach().to(torch.promote_types(keys.dtype, torch.float32)), dim=1)
    g = torch.Generator().manual_seed(seed)
    at = [int(torch.randint(len(P), (1,), generator=g))]
    far = (P - P[at[0]]).square().sum(1)
    while len(at) < experts:                     # far from those there are, by chance
        weight = far.double().cpu().clamp_min(1e-12)
        at.append(int(torch.multinomial(weight, 1, generator=g)))
        far = torch.minimum(far, (P - P[at[-1]]).square().sum(1))
    means, labels = P[at], None
    for _ in range(ROUNDS):
        now = assigned(P @ means.t() - means.square().sum(1) / 2, len(P) // experts)
        if labels is not None and torch.equal(now, labels):
            break
        labels = now
        means = P[labels.argsort(stable=True)].view(experts, -1, P.shape[1]).mean(1)
    assert labels is not None
    return labels.argsort(stable=True)


class Emergent(Routed):
    """keys: the matrix whose rows are clustered, for the listener that runs first. k experts
    answer, each as it is. channels (F,), gate (E, I): what was found, kept in files."""

    part, whole = "emoe", True
    channels: Tensor
    gate: Tensor

    def __init__(self, *args: Any, k: int, keys: Tensor | None, experts: int, seed: int,
                 blank: bool):
        super().__init__(*args, k=k, part=self.part)
        if keys is None:
            return
        blank = blank or is_fake(keys)
        order = torch.arange(len(keys), device=keys.device) if blank else \
            clusters(keys, experts, seed)
        wide = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
        self.register_buffer("channels", order)
        self.register_buffer("gate", wide[order].view(experts, -1, keys.shape[1]).mean(1))

    @property
    def routes(self) -> bool:
        return hasattr(self, "gate")

    def route(self, x: Tensor) -> Routing:
        E, flat = len(self.gate), x.reshape(-1, x.shape[-1])
        if self.k == E:
            index = torch.arange(E, device=x.device).expand(len(flat), E)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            with torch.no_grad(), uncast(x):
                index = F.linear(flat.to(wide), self.gate.to(wide)).topk(self.k, -1).indices
        r = dealt(x, index, E, None)
        r.channels = self.channels
        return r
