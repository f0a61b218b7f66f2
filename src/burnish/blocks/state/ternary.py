"""Copies of an MLP in ternary numbers, of which a router takes a few for each token.

    W~ = clip(round(W / (g + eps)), -1, 1)      g = mean |W|
    x~ = clip(round(127 x / m), -128, 127)      m = max |x| of the token
    y = (x~ W~^T) g m / 127 + b

Gradients pass straight through both roundings: those of ``y = x^ W^^T``, x^ = x~ m / 127, W^ = g
W~. Kept for backward: the codes of x, a byte a number, and m; the weight is rounded again.

Letters: N tokens, M = N k rows, E experts, I in, O out.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Place
from ..tape.cast import uncast
from ..tape.functions import applied, once_differentiable
from ..update.objective import Riding
from ..weight.experts import balance, counted, top_k
from .routed import dealt

EPS = 1e-5


def ternary(W: Tensor) -> tuple[Tensor, Tensor]:
    """(W~ in -1, 0, 1, int8; g in fp32 at least) of a matrix."""
    wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    g = wide.abs().mean()
    return (wide / (g + EPS)).round_().clamp_(-1, 1).to(torch.int8), g


def bytes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x~, int8; m / 127 (..., 1)) of tokens; a token of zeros has codes of zero."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    m = wide.abs().amax(-1, keepdim=True)
    codes = (127 * wide / m.clamp_min(EPS)).round_().clamp_(-128, 127).to(torch.int8)
    return codes, m / 127


def packed(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 in two bits each, four to a byte."""
    flat = F.pad((codes.flatten() + 1).to(torch.uint8), (0, -codes.numel() % 4)).view(-1, 4)
    return flat[:, 0] | flat[:, 1] << 2 | flat[:, 2] << 4 | flat[:, 3] << 6


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`packed` was given."""
    four = torch.stack([bits >> n & 3 for n in (0, 2, 4, 6)], 1).flatten()
    return (four[: shape.numel()].to(torch.int8) - 1).view(shape)


def _product(x: Tensor, scale: Tensor, W: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    return ((x.to(dtype) @ W.to(dtype).t()) * (scale * g)).to(dtype)


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        codes, scale = bytes_of(x)
        ctx.save_for_backward(codes, scale, W)
        return _product(codes, scale, *ternary(W), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        codes, scale, W = ctx.saved_tensors
        made, g = ternary(W)
        dx = (gy @ made.to(gy.dtype)) * g.to(gy.dtype) if ctx.needs_input_grad[0] else None
        dW = None
        if ctx.needs_input_grad[1]:
            rows = (codes.to(scale.dtype) * scale).to(gy.dtype).flatten(0, -2)
            dW = (gy.flatten(0, -2).t() @ rows).to(W.dtype)
        return dx, dW


class Latent(nn.Module):
    """A linear of ternary weights: weight (O, I) is what trains, rounded in each forward."""

    def __init__(self, W: Tensor, bias: Tensor | None):
        super().__init__()
        wide = torch.promote_types(W.dtype, torch.float32)
        self.weight = nn.Parameter(W.detach().to(wide, copy=True).contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(wide, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        with uncast(x):
            y: Tensor = applied(_Ternary, x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Two bits a weight, and g."""
        codes, g = ternary(self.weight)
        own = {} if self.bias is None else {"bias": self.bias.detach()}
        return {"bits": packed(codes), "gamma": g, **own}


class Stored(nn.Module):
    """The same from its codes, which do not train: bits (O I / 4) bytes, gamma."""

    bits: Tensor
    gamma: Tensor

    def __init__(self, W: Tensor, bias: Tensor | None):
        super().__init__()
        self.shape = W.shape
        self.register_buffer("bits", W.new_zeros(-(-W.numel() // 4), dtype=torch.uint8))
        wide = torch.promote_types(W.dtype, torch.float32)
        self.register_buffer("gamma", W.new_zeros((), dtype=wide))
        self.bias = None if bias is None else nn.Parameter(
            bias.detach().to(wide, copy=True), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """g W~: some MLPs look at what their linears hold."""
        return unpacked(self.bits, self.shape).to(self.gamma.dtype) * self.gamma

    def forward(self, x: Tensor) -> Tensor:
        with uncast(x):
            y = _product(*bytes_of(x), unpacked(self.bits, self.shape), self.gamma, x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TernaryExperts(nn.Module):
    """``sum_{e in top-k} p_e FFN_e(x)``, p = softmax(W_r x) in fp32, FFN_e a copy of `mlp` whose
    linears (`places`) are ternary. router (E, I). coefficient: of the balance loss."""

    def __init__(self, mlp: nn.Module, places: list[Place], path: str, width: int, experts: int,
                 k: int, coefficient: float, stored: bool):
        super().__init__()
        self.k, self.coefficient = k, coefficient
        self.experts = nn.ModuleList(_copied(mlp, places, path, stored) for _ in range(experts))
        bound = width ** -0.5
        self.router = nn.Parameter(torch.empty(experts, width).uniform_(-bound, bound))
        if stored:
            self.requires_grad_(False)
        self.riding = Riding()                   # alone; attached, the model's

    def attached(self, attacher: Any) -> None:
        """Share the scale of the loss with all of the model."""
        self.riding = attacher.state.riding

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        with uncast(x):
            p = (flat.to(self.router.dtype) @ self.router.t()).softmax(-1)
        value, index = p.topk(self.k, -1)
        r = dealt(flat, index, len(self.experts), value)
        rows, c = flat[r.token], r.c
        if self.coefficient and (self.riding.collected is not None
                                 or self.training and torch.is_grad_enabled()):
            shaped = p.view(*x.shape[:-1], -1)
            c = self.riding.on(c, balance(shaped, top_k(shaped, self.k), counted(x)),
                               self.coefficient)
        made = [expert(rows[a:b]) for expert, (a, b) in zip(self.experts, pairwise(r.ends),
                                                            strict=True)]
        y = r.back(torch.cat(made).to(x.dtype) * c.to(x.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over."""
        out = {n: p.detach() for n, p in self.named_parameters()
               if not isinstance(self.get_submodule(n.rpartition(".")[0]), Latent)}
        for n, m in self.named_modules():
            if isinstance(m, Latent):
                out.update({f"{n}.{k}": t for k, t in m.finished().items()})
        return out


def _copied(mlp: nn.Module, places: list[Place], path: str, stored: bool) -> nn.Module:
    """A copy of an MLP with ternary linears in the place of its own."""
    slot = mlp._modules.get("burnish")               # what acts around it acts around all experts
    made = copy.deepcopy(mlp, {} if slot is None else {id(slot): None})
    if slot is not None:
        del made._modules["burnish"]
        made.__class__ = getattr(type(mlp), "_burnish_base", type(mlp))
    made.requires_grad_(not stored)
    for place in places:
        *above, leaf = place.path[len(path) + 1 :].split(".")
        home = made.get_submodule(".".join(above))
        own = home.get_submodule(leaf)
        W, bias = place.view(own.weight.detach()), own.bias  # type: ignore[operator]
        setattr(home, leaf, (Stored if stored else Latent)(W, bias))  # type: ignore[arg-type]
    return made
