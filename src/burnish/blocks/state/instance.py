"""A prompt of one token that a sample's own tokens make, for the last block of a frozen network.

    x^0 = Y,   x^l_i = max_{j near i} leaky(BN(W_l [x_j - x_i; x_i])),   l = 1, 2, 3
    p = max_i leaky(BN(W [x^1_i; x^2_i; x^3_i]))

near: the k tokens whose x is nearest, found again for every l. No block below the last keeps
anything; of the last one the prompt and the largest of the tokens' states are read by the head too.

Letters: B samples, G tokens, D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from .prompts import Listener, named
from .taps import Beside

_LEAK = 0.2


def nearest(x: Tensor, k: int) -> Tensor:
    """(B, G, k): which k tokens of each sample are nearest to each, itself among them."""
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().sum(-1)
        far = square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * wide @ wide.mT
        return far.topk(min(k, x.shape[1]), largest=False).indices


class Edges(nn.Module):
    """``max_{j near i} leaky(BN(W [x_j - x_i; x_i]))``, W (D, 2 D) without a bias.

    Products are made token by token and then laid beside each other, so that an edge is D numbers
    and not 2 D.
    """

    def __init__(self, width: int, k: int):
        super().__init__()
        self.k = k
        self.linear = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        near = nearest(x, self.k)
        of_edge, of_own = self.linear.weight.chunk(2, 1)
        there, here = F.linear(x, of_edge), F.linear(x, of_own - of_edge)
        sample = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        edges = there[sample, near] + here.unsqueeze(2)
        made = self.norm(edges.flatten(0, 2)).view(edges.shape)
        return F.leaky_relu(made, _LEAK).max(2).values


class FromTokens(nn.Module):
    """p (B, D) of tokens Y (B, G, D), whatever their order."""

    def __init__(self, width: int, k: int):
        super().__init__()
        self.edges = nn.ModuleList(Edges(width, k) for _ in range(3))
        self.linear = nn.Linear(3 * width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.to(self.linear.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            seen = [x := edges(x) for edges in self.edges]
            made = self.linear(torch.cat(seen, -1))
            made = self.norm(made.flatten(0, 1)).view(made.shape)
            return F.leaky_relu(made, _LEAK).amax(1)


class Instance(Beside):
    """Listens to the last block: p of its tokens stands behind the first `after`, with a place (D,)
    of its own, and goes on behind the block."""

    def __init__(self, state: Any, adapter: str, width: int, k: int, after: int):
        super().__init__(state, adapter)
        self.maker, self.after = FromTokens(width, k), after
        self.place = nn.Parameter(torch.randn(width) * 0.02)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = args[0] if args else next(iter(kw.values()))
        if given.dim() != 3 or named(module, args, kw).get("attention_mask") is not None:
            raise RecipeError("idpt puts a token among (batch, tokens, width) without a mask; "
                              f"{type(module).__name__} is given {tuple(given.shape)}")
        args, kw = self.alone(module, given, args, kw)
        p = (self.maker(given[:, self.after :]) + self.place).to(given.dtype).unsqueeze(1)
        x = torch.cat([given[:, : self.after], p, given[:, self.after :]], 1)
        self.here.box["instance", self.adapter] = True
        return call(x, *args[1:], **kw) if args else call(**{**kw, next(iter(kw)): x})


class Parted(Listener):
    """Listens to what ends the stack (its last norm, or the last block): the prompt's state and the
    largest of the tokens' are taken for the head (queries.Columns), and the prompt leaves."""

    def __init__(self, state: Any, adapter: str, after: int):
        super().__init__(state, adapter)
        self.after = after

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        if self.here.box.pop(("instance", self.adapter), None) is None:
            return out
        h, a = out[0] if isinstance(out, tuple) else out, self.after
        most = h[:, a + 1 :].max(1).values
        self.here.box["queries", self.adapter] = [h[:, a], most]
        left = torch.cat([h[:, :a], h[:, a + 1 :]], 1)
        return (left, *out[1:]) if isinstance(out, tuple) else left
