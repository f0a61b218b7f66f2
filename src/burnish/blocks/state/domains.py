"""Memories of domains beside an MLP's last linear, weighed sample by sample against it.

    o_i = U_i gelu(D_i u + d_i) + c_i, i = 1..n      o_{n+1} = W u + b      g = softmax(gate(u_t))
    o = sum_i g_i o_i

u (..., F) is what the linear reads, t the sample's last token: one g for all of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ..tape.cast import uncast
from .bottleneck import Bottleneck
from .prompts import Listener


def last_token(u: Tensor, valid: Tensor | None) -> Tensor:
    """(B, F): of the last token that is no padding, of u (B, T, F)."""
    if valid is None:
        return u[:, -1]
    at = (torch.arange(u.shape[1], device=u.device) * valid.ne(0)).argmax(1)
    return u[torch.arange(len(u), device=u.device), at]


def gate(width: int, hidden: int, answers: int, dropout: float, lean: float) -> nn.Sequential:
    """Three hidden linears; lean is added to the last answer's bias."""
    layers: list[nn.Module] = [nn.Dropout(dropout), nn.Linear(width, hidden)]
    for _ in range(2):
        layers += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden)]
    layers += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, answers)]
    with torch.no_grad():
        layers[-1].bias[-1] += lean                  # type: ignore[index]
    return nn.Sequential(*layers)


class Domains(Listener):
    """Listens to the last linear of an MLP. adapters: of the domains; gate: None where the first
    adapter answers alone. frozen: adapters do not train. padded: the last position is taken as it
    stands, padding or not. noted: what the mixture changes is left for :class:`Kept`.
    """

    what = "a mixture of domains"

    def __init__(self, state: Any, adapter: str, adapters: list[Bottleneck],
                 gate: nn.Sequential | None, *, frozen: bool, padded: bool, noted: bool):
        super().__init__(state, adapter)
        self.adapters, self.gate = nn.ModuleList(adapters), gate
        self.padded, self.noted = padded, noted
        self.empty = frozen                          # perhaps: the first training forward looks
        if frozen:
            self.adapters.requires_grad_(False)

    def around(self, module: nn.Module, call: Callable[..., Any], u: Tensor, *args: Any,
               **kw: Any) -> Any:
        if self.empty and self.training:
            if not any(a.up.weight.any() for a in self.adapters):
                raise RecipeError("mixda(learns='task') weighs domains that have been learnt, and "
                                  "there are none: train learns='domain' first, then its lifecycle")
            self.empty = False
        own = call(u, *args, **kw)
        if self.gate is None:
            out = self.adapters[0](u)
        else:
            if u.dim() != 3:
                raise RecipeError(f"mixda: an MLP is given states of {tuple(u.shape)}; expected "
                                  "(batch, tokens, channels)")
            g = self.weights(u).to(own.dtype)[:, None]
            out = g[..., -1:] * own
            for i, adapter in enumerate(self.adapters):
                out = out + g[..., i : i + 1] * adapter(u)
        if self.noted:
            self.here.box["mixda", self.adapter] = out - own
        return out

    def weights(self, u: Tensor) -> Tensor:
        """g (B, n + 1) of states u (B, T, F)."""
        valid = None if self.padded else context().valid
        valid = valid if valid is not None and valid.shape == u.shape[:2] else None
        assert self.gate is not None
        with uncast(u):                              # in its own precision
            x = last_token(u, valid).to(self.gate[1].weight.dtype)
            return self.gate(x).softmax(-1)


class Kept(Listener):
    """Listens to what ends the layer (its last norm, or the block): on samples whose key `general`
    is 1 its result is held near what it is without the mixture,

        weight mean (y - y')^2,    y' of the linear alone, without a gradient.

    norm: the module is a norm of the sum of residual and mixture; else the result is that sum.
    """

    what = "a mixture of domains"

    def __init__(self, state: Any, adapter: str, weight: float, norm: bool):
        super().__init__(state, adapter)
        self.weight, self.norm = weight, norm

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        delta, riding = self.here.box.pop(("mixda", self.adapter)), self.state.riding
        if not (riding.collected is not None or self.training and torch.is_grad_enabled()):
            return out
        y = out[0] if isinstance(out, tuple) else out
        with torch.no_grad():
            alone = call(args[0] - delta) if self.norm else y - delta
        general = context().per_row("general", y).to(y.dtype)
        wide = torch.promote_types(y.dtype, torch.float32)
        each = (y.to(wide) - alone.to(wide)).square().flatten(1).mean(1)
        general = general.to(wide).expand(len(each))
        y = riding.on(y, (each * general).sum() / general.sum().clamp_min(1), self.weight)
        return (y, *out[1:]) if isinstance(out, tuple) else y
