"""Selective scans: a state space whose step, input and output matrices are made of what it reads.

    h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t,     y_t = h_t C_t + D x_t,     h_0 = 0

by channel: x_t, Delta_t (channels,), A (channels, state), B_t, C_t (state,). :class:`FourWays` does
so over the rows and the columns of a map, each there and back, and adds the four.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: channels whose states exist at once; each slice is made again in backward
SLICE = 64


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y (rows, length, channels) of x and delta of the same shape, A (channels, state), B and C
    (rows, length, state), D (channels,).

    Channels do not meet, so they are gone through a slice at a time; for backward the arguments are
    kept, and states of one slice at a time are made again.
    """
    out = [checkpoint(_scan, x[..., i:i + SLICE], delta[..., i:i + SLICE], A[i:i + SLICE], B, C,
                      use_reentrant=False) for i in range(0, x.shape[-1], SLICE)]
    return torch.cat(out, -1) + D * x


def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    keep = (delta.unsqueeze(-1) * A).exp()                         # (rows, length, channels, state)
    put = (delta * x).unsqueeze(-1) * B.unsqueeze(-2)
    h = x.new_zeros(x.shape[0], x.shape[-1], A.shape[-1])
    out = []
    for k, u, c in zip(keep.unbind(1), put.unbind(1), C.unbind(1), strict=True):
        h = k * h + u
        out.append((h @ c.unsqueeze(-1)).squeeze(-1))
    return torch.stack(out, 1)


class Scanned(NamedTuple):
    """What a scan of a map answers, and what it was made of.

    y: (rows, h w, width), gated.  z: the same before the gate.  delta (rows, 4, h w, width), B and
    C (rows, 4, h w, state): of the four ways, places in each way's own order.
    """

    y: Tensor
    z: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor


class FourWays(nn.Module):
    """Four selective scans of a map (rows, h, w, width), gated.

    ``[u; g] = W_in x``; of silu(u), along rows, columns and both backwards, a scan each with its
    own Delta = softplus(W_dt W_d u + b), B = W_b u and C = W_c u; y = (sum of the four) silu(g).
    silent: the rows of W_in that make g are zero, so that y is 0 whatever is read, and trains.
    Trains ``2 width^2 + 4 (width (rank + 2 state) + rank width + width + width state + width)``.
    """

    def __init__(self, width: int, state: int, rank: int, silent: bool = False):
        super().__init__()
        self.state, self.rank = state, rank
        self.into = nn.Linear(width, 2 * width, bias=False)
        self.read = nn.Parameter(torch.empty(4, rank + 2 * state, width))
        self.step = nn.Parameter(torch.empty(4, width, rank))
        self.step_bias = nn.Parameter(torch.empty(4, width))
        self.log_a = nn.Parameter(torch.arange(1, state + 1.0).log().expand(4, width, -1).clone())
        self.skip = nn.Parameter(torch.ones(4, width))
        for t, fan in ((self.read, width), (self.step, rank)):
            nn.init.uniform_(t, -fan**-0.5, fan**-0.5)
        with torch.no_grad():
            # softplus of the bias is spread evenly in its logarithm from 0.001 to 0.1
            size = torch.empty(4, width).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.step_bias.copy_(size + (-(-size).expm1()).log())
            if silent:
                self.into.weight[width:] = 0

    def forward(self, x: Tensor) -> Scanned:
        n, h, w, width = x.shape
        u, gate = self.into(x).chunk(2, -1)
        u = F.silu(u)
        rows, columns = u.reshape(n, h * w, width), u.transpose(1, 2).reshape(n, h * w, width)
        ways = torch.stack([rows, columns, rows.flip(1), columns.flip(1)], 1)    # (n, 4, hw, width)
        made = torch.einsum("nkli,kri->nklr", ways, self.read)
        d, B, C = made.split([self.rank, self.state, self.state], -1)
        delta = F.softplus(torch.einsum("nklr,kir->nkli", d, self.step)
                           + self.step_bias.unsqueeze(1))
        A = -self.log_a.exp()
        y = [selective_scan(ways[:, k], delta[:, k], A[k], B[:, k], C[:, k], self.skip[k])
             for k in range(4)]
        back = [y[0], y[1], y[2].flip(1), y[3].flip(1)]
        across = (back[1] + back[3]).reshape(n, w, h, width).transpose(1, 2)
        z = back[0] + back[2] + across.reshape(n, h * w, width)
        return Scanned(z * F.silu(gate.reshape(n, h * w, width)), z, delta, B, C)
