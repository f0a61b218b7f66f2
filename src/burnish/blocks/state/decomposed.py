"""Adapters whose weights are small generated matrices, made larger layer by layer.

    P_t, Q_t = W^P z_t, W^Q z_t                          D_l = S_l (x) (P_t Q_t)
    f(h) = gelu(h D_l) U_l,  U_l likewise of factors of its own

z_t stands for a task; S_l (a, a) is each layer's own, a its width over the narrowest, so one
template serves all. Neither that nor D is ever formed: with h read as a rows, ``S^T ((h P) Q)``.

Letters: B samples, D narrowest width, M its bottleneck, R rank, K width of an embedding, T tasks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ..tape.executor import checkpoint
from .bottleneck import Bottleneck


class Templates(nn.Module):
    """For task ids (B,): P (B, D, R) and Q (B, R, M) of the first matrix, those (B, M, R) and
    (B, R, D) of the second.

    z (T, K) is N(0, 1 / K), of length one or so; generators (rows, K) are normal, so that templates
    have entries of deviation 1 / sqrt(D) and 1 / sqrt(M). lite: the factor of D is one tensor
    (D, R), for both matrices and all tasks, and only the other is generated.
    """

    def __init__(self, tasks: int, embedding: int, d: int, m: int, rank: int, lite: bool):
        super().__init__()
        self.d, self.m, self.rank = d, m, rank
        self.task = nn.Embedding(tasks, embedding)
        nn.init.normal_(self.task.weight, std=embedding**-0.5)
        self.wide = nn.Parameter(torch.randn(d, rank) * d**-0.5) if lite else None
        shapes = {"down_q": (rank * m, rank), "up_p": (m * rank, m)}
        if not lite:
            shapes |= {"down_p": (d * rank, d), "up_q": (rank * d, rank)}
        for name, (rows, over) in shapes.items():
            value = torch.randn(rows, embedding) * over**-0.5
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, task: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, d, m, r = self.task(task), self.d, self.m, self.rank
        Q, P2 = F.linear(z, self.down_q).view(-1, r, m), F.linear(z, self.up_p).view(-1, m, r)
        if self.wide is not None:
            P = self.wide.expand(len(z), d, r)
            return P, Q, P2, P.transpose(1, 2) * (d / r) ** 0.5
        return (F.linear(z, self.down_p).view(-1, d, r), Q, P2,
                F.linear(z, self.up_q).view(-1, r, d))


class Decomposed(nn.Module):
    """``f(h) = gelu(h D_l) U_l`` for the key ``task``, at a width of `times` D.

    templates: who holds it for others `owns` it, the others borrow. S_down is the identity, S_up
    zero: nothing at the start. Kept for backward: h alone.
    """

    templates: Templates

    def __init__(self, templates: Templates, times: int, owns: bool):
        super().__init__()
        if owns:
            self.templates = templates
        else:
            self.__dict__["templates"] = templates
        self.S_down = nn.Parameter(torch.eye(times))
        self.S_up = nn.Parameter(torch.zeros(times, times))
        self.S_down.burnish_decay = self.S_up.burnish_decay = False

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another site holds, for whoever runs this again in backward."""
        return () if "templates" in self._modules else tuple(self.templates.parameters())

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self, self.run, (h,), {})

    def run(self, h: Tensor) -> Any:
        """f itself."""
        task, x = context().by_entry("task", h)
        P, Q, P2, Q2 = (t.to(h.dtype).unsqueeze(1) for t in self.templates(task.long()))
        n = len(self.S_down)
        z = x.flatten(1, -2).unflatten(-1, (n, -1))                # (B, rows, a, D)
        z = _over(self.S_down, z.flatten(1, 2).unsqueeze(1) @ P @ Q, n)
        y = _over(self.S_up, F.gelu(z).flatten(1, 2).unsqueeze(1) @ P2 @ Q2, n)
        return y.reshape(h.shape)

    @torch.no_grad()
    def plain(self, task: int) -> Bottleneck:
        """The adapter of one task by itself."""
        made = stored(self.templates.d, self.templates.m, len(self.S_down)).to(self.S_up.device)
        P, Q, P2, Q2 = (t[0] for t in self.templates(
            torch.tensor([task], device=self.S_up.device)))
        made.down.weight.copy_(torch.kron(self.S_down, P @ Q).t())
        made.up.weight.copy_(torch.kron(self.S_up, P2 @ Q2).t())
        return made


def _over(S: Tensor, z: Tensor, n: int) -> Tensor:
    """(B, rows, n, width) of z (B, 1, rows n, width): S^T z over the n."""
    parts = z.squeeze(1).unflatten(1, (-1, n))
    return torch.einsum("ab,nrad->nrbd", S.to(z.dtype), parts)


def stored(d: int, m: int, times: int) -> Bottleneck:
    """The form of an adapter that was generated once."""
    return Bottleneck(d * times, m * times, act="gelu", bias=False)
