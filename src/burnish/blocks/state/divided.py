"""One matrix whose entries belong to experts, of which one answers at a time, or all together.

Every entry has one owner, a byte. What an expert has learned is a vector of its entries, so the
optimizer knows experts one by one; their sum is the matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...core.call import context
from ...core.followed import is_fake
from ..tape.functions import once_differentiable
from ..weight.sparse import spread

#: of the call: which expert answers; without it all do
EXPERT = "expert of a divided matrix"
#: entries compete for experts all together, or within an output or an input
By = Literal["matrix", "row", "column"]


def owners(out: int, inp: int, experts: int, by: By, seed: int, key: str) -> Tensor:
    """uint8 (out, in): who owns each entry. Scores are a permutation drawn from seed and key, the
    same on every machine; equal bands of them, within what competes, have an owner each."""
    with unset_fake_temporarily():                   # they have values, also in a simulation
        score = spread(out * inp, out * inp, seed, key)
        if by == "matrix":
            return (score * experts // (out * inp)).to(torch.uint8).view(out, inp)
        dim = 1 if by == "row" else 0
        rank = score.view(out, inp).argsort(dim).argsort(dim)
        return (rank * experts // rank.shape[dim]).to(torch.uint8)


class _Placed(torch.autograd.Function):
    """A matrix of the entries of some experts, zero elsewhere. Keeps the owners alone."""

    @staticmethod
    def forward(ctx: Any, owner: Tensor, mine: tuple[int, ...], *values: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.mine, ctx.sizes = mine, [v.numel() for v in values]
        W = values[0].new_zeros(owner.shape)
        for k, v in zip(mine, values, strict=True):
            W.masked_scatter_(owner == k, v)
        return W

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        (owner,) = ctx.saved_tensors
        return None, None, *[_of(G, owner, k, n) if need else None for k, n, need in
                             zip(ctx.mine, ctx.sizes, ctx.needs_input_grad[2:], strict=True)]


def _of(W: Tensor, owner: Tensor, k: int, n: int) -> Tensor:
    """The n entries that belong to expert k."""
    return W.new_empty(n) if is_fake(W) else W[owner == k]


class Divided(nn.Module):
    """A linear layer ``x W^T + b`` with W (out, in) divided among experts; b is everybody's.

    experts: their entries, in the order of the matrix read row by row.  owner: uint8 (out, in).
    start: W at the start.
    """

    def __init__(self, start: Tensor, bias: Tensor, owner: Tensor, experts: int):
        super().__init__()
        self.owner: Tensor
        with unset_fake_temporarily():
            sizes = torch.bincount(owner.flatten().long(), minlength=experts).tolist()
        owner = owner + torch.zeros((), dtype=torch.uint8, device=start.device)
        self.register_buffer("owner", owner, persistent=False)
        self.experts = nn.ParameterList(_of(start, owner, k, n) for k, n in enumerate(sizes))
        self.bias = nn.Parameter(bias)

    @property
    def weight(self) -> Tensor:
        """W of the expert that the call names, zero where others own; without a name all of W."""
        named = context().given.get(EXPERT)
        mine = tuple(range(len(self.experts))) if named is None else (named,)
        return _Placed.apply(self.owner, mine, *(self.experts[k] for k in mine))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
