"""The bottleneck every adapter of the literature is made of.

    f(h) = s (W_up mix(drop(act(W_down h + b_down))) + b_up)

Letters: N tokens, D width in, R width of the bottleneck, O width out. The two products and the
activation are one autograd function that keeps h (which the frozen layer shares) and the R-wide
pre-activation; a stock chain also keeps the activation and, under autocast, copies of both
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, nearest
from ..linalg import over_tokens, truncated_normal_
from ..tape.cast import autocast, uncast
from ..tape.functions import once_differentiable, shaped, transformed
from ..tape.replay import States, replay, rng_state
from ..tape.roles import reading

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"), "linear": lambda z: z,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind a name; ConfigError with the nearest name otherwise."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)} "
                          f"(there are {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


class Bottleneck(nn.Module):
    """``f(h) = s (W_up mix(act(W_down norm(h) + b_down)) + b_up)``; norm may stand at either end.

    down.weight (R, D), down.bias (R,), up.weight (O, R), up.bias (O,): R (D + O) + R + O numbers,
    plus 2 D or 2 O for a norm and whatever the mixer holds. heads: R and O fall into as many equal
    runs, and a run of outputs reads its own run of R: up.weight (O, R / heads).

    act: a name of :data:`ACTIVATIONS`. norm: None, "in" or "out" (a LayerNorm that trains).
    scale: s multiplies the whole branch, its bias too; with `train_scale` it is one number more
    that trains, without weight decay, from there on. dropout acts on the activation and is drawn
    again in backward. mixer: any module from (..., R) to (..., `inner`), None for none; inner: R.
    init: "zero" (down Kaiming-uniform(sqrt 5), everything else 0: the branch is exactly 0),
    "bert" (N(0, 0.02), biases 0), "truncated" (normal cut at two deviations of 0.01, biases 0),
    "xavier" (uniform, biases N(0, 1e-6)), "linear" (as torch draws linears).

    Kept for backward: h, and R numbers per token.
    """

    def __init__(self, d_in: int, width: int, d_out: int | None = None, *, act: str = "relu",
                 norm: Literal["in", "out"] | None = None, scale: float = 1.0,
                 train_scale: bool = False, dropout: float = 0.0, bias: bool = True,
                 mixer: nn.Module | None = None, heads: int = 1,
                 inner: int | None = None,
                 init: Literal["zero", "bert", "truncated", "xavier", "linear"] = "zero"):
        super().__init__()
        d_out = d_in if d_out is None else d_out
        activation(act)
        if width % heads or d_out % heads:
            raise ConfigError(f"a bottleneck of {width} and {d_out} outputs do not fall into "
                              f"{heads} equal heads")
        self.act, self.dropout, self.heads = act, dropout, heads
        self.scale: Any = scale
        if train_scale:
            made: Any = nn.Parameter(torch.tensor(float(scale)))
            made.burnish_decay = False                # it would pull the branch to nothing
            del self.scale
            self.scale = made
        self.down = nn.Linear(d_in, width, bias)
        self.up = nn.Linear((inner or width) // heads, d_out, bias)
        self.norm_in = nn.LayerNorm(d_in) if norm == "in" else None
        self.norm_out = nn.LayerNorm(d_out) if norm == "out" else None
        self.mixer = mixer
        self.reset(init)

    def reset(self, init: str) -> None:
        """Draw the start again (see the class)."""
        for linear in (self.down, self.up):
            if init == "linear":
                linear.reset_parameters()
                continue
            if init == "bert":
                nn.init.normal_(linear.weight, std=0.02)
            elif init == "truncated":
                truncated_normal_(linear.weight, 0.01)
            elif init == "xavier":
                nn.init.xavier_uniform_(linear.weight)
            elif linear is self.up:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=5 ** 0.5)
            if linear.bias is not None and init == "xavier":
                nn.init.normal_(linear.bias, std=1e-6)
            elif linear.bias is not None:            # (drawing nothing: other starts stay)
                nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        if self.norm_in is not None:
            h = _in_dtype_of(self.norm_in, h)
        p = self.dropout if self.training else 0.0
        A, a, B, b = self.sides()
        if self.mixer is None and self.heads == 1 and not transformed():
            h = autocast(h)
            with reading((h,)):
                y = _Pair.apply(h, self.act, self.scale, p, A, a, B, b)
        else:
            z = F.linear(h, A.to(h.dtype), None if a is None else a.to(h.dtype))
            z = F.dropout(activation(self.act)(z), p, p > 0)
            z = z if self.mixer is None else self.mixer(z)
            y = self._widened(z * self.scale, B.to(z.dtype))   # a product of R numbers, not of O
            y = y if b is None else y + (b * self.scale).to(y.dtype)
        return y if self.norm_out is None else _in_dtype_of(self.norm_out, y)

    def sides(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """W_down, b_down, W_up, b_up."""
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias

    def _widened(self, z: Tensor, W: Tensor) -> Tensor:
        """``z W^T``, head by head."""
        if self.heads == 1:
            return F.linear(z, W)
        z_HNR = z.reshape(-1, self.heads, W.shape[1]).transpose(0, 1)
        W_HRO = W.view(self.heads, -1, W.shape[1]).transpose(1, 2)
        return (z_HNR @ W_HRO).transpose(0, 1).reshape(*z.shape[:-1], -1)

    def dense(self, h: Tensor) -> Tensor:
        """The same by the obvious route, without dropout: the reference."""
        h = h if self.norm_in is None else self.norm_in(h)
        z = activation(self.act)(self.down(h))
        z = z if self.mixer is None else self.mixer(z)
        if self.heads == 1:
            y = self.up(z) * self.scale
        else:
            eye = torch.eye(self.heads, dtype=z.dtype, device=z.device)
            W = self.up.weight.view(self.heads, -1, 1, self.up.weight.shape[1])
            W = (W * eye[:, None, :, None]).reshape(len(self.up.weight), -1)
            y = F.linear(z, W, self.up.bias) * self.scale
        return y if self.norm_out is None else self.norm_out(y)

    @torch.no_grad()
    def absorb_scale(self) -> None:
        """Put s into W_up and b_up: the same function at s = 1."""
        for p in self.up.parameters():
            p.mul_(self.scale)
        if isinstance(self.scale, nn.Parameter):
            self.scale.fill_(1.0)
        else:
            self.scale = 1.0

    @staticmethod
    def count(d_in: int, width: int, d_out: int | None = None, heads: int = 1) -> int:
        """Trainable numbers of one bottleneck without norm and mixer."""
        d_out = d_in if d_out is None else d_out
        return width * d_in + width // heads * d_out + width + d_out


def _in_dtype_of(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm on a state that may be of lower precision than its parameters."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype),
                        norm.eps)


class _Pair(torch.autograd.Function):
    """s (drop(act(h A^T + a)) B^T + b), keeping h and the pre-activation."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, act: str, scale: float | Tensor, p: float, A: Tensor,
                a: Tensor | None, B: Tensor, b: Tensor | None) -> Tensor:
        ctx.act, ctx.p, ctx.shape = act, p, h.shape
        s = scale if isinstance(scale, Tensor) else None
        ctx.scale = None if s is not None else scale
        ctx.state = rng_state(h.device) if p else None
        with uncast(h):
            h2 = h.reshape(-1, h.shape[-1])
            z = F.linear(h2, A.to(h.dtype), None if a is None else a.to(h.dtype))
            u = ACTIVATIONS[act](z)
            u = F.dropout(u, p, True) if p else u
            y = F.linear(u, B.to(h.dtype), None if b is None else b.to(h.dtype))
            y = y.mul_(scale) if s is not None or scale != 1 else y
        need_h, _, need_s, _, need_A, need_a, _, _ = ctx.needs_input_grad
        ctx.dtypes = [None if t is None else t.dtype for t in (A, a, B, b)]
        ctx.save_for_backward(h if need_A else None, z, A if need_h else None,
                              B if need_h or need_A or need_a or need_s else None, s,
                              b if need_s else None)
        return shaped(y, (*h.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        h, z, A, B, s, b = ctx.saved_tensors
        need_h, _, need_s, _, need_A, need_a, need_B, need_b = ctx.needs_input_grad
        scale = ctx.scale if s is None else s
        of_A, of_a, of_B, of_b = ctx.dtypes
        g2 = g.reshape(-1, g.shape[-1])
        with torch.enable_grad():                       # the activation's own derivative, R wide
            leaf = z.detach().requires_grad_()
            u = ACTIVATIONS[ctx.act](leaf)
        dB = db = dA = da = dh = ds = None
        v = _again(u.detach(), ctx.p, ctx.state) if need_B or need_s else None
        if need_B:
            dB = over_tokens(g2, v).mul_(scale).to(of_B)
        if need_b:
            db = g2.sum(0).mul_(scale).to(of_b)
        if B is None:
            return dh, None, ds, None, dA, da, dB, db
        gv = g2 @ B.to(g2.dtype)
        if need_s:                                      # <g, v B^T + b>, R wide
            assert s is not None and v is not None
            ds = (gv * v).sum(dtype=s.dtype)
            ds = ds if b is None else ds + g2.sum(0).to(s.dtype) @ b.to(s.dtype)
        # dropout is linear: the same mask on the gradient
        gu = _again(gv.mul_(scale), ctx.p, ctx.state)
        (gz,) = torch.autograd.grad(u, leaf, gu)
        if need_A:
            dA = (gz.t() @ h.reshape(-1, h.shape[-1])).to(of_A)
        if need_a:
            da = gz.sum(0).to(of_a)
        if need_h:
            dh = (gz @ A.to(gz.dtype)).view(ctx.shape)
        return dh, None, ds, None, dA, da, dB, db


def _again(t: Tensor, p: float, state: States | None) -> Tensor:
    if state is None:
        return t
    with replay(t.device, state):
        return F.dropout(t, p, True)


class Normed(nn.Module):
    """A bottleneck that reads a state behind a frozen norm of the model, which is not its own."""

    def __init__(self, norm: nn.Module, bottleneck: Bottleneck):
        super().__init__()
        self.__dict__["norm"] = norm
        self.inner = bottleneck

    def forward(self, h: Tensor) -> Tensor:
        base = getattr(type(self.norm), "_burnish_base", type(self.norm))
        return self.inner(base.forward(self.norm, h))      # past the norm's own slot


class Resting(nn.Module):
    """``LN(gelu(f(x)) + x)`` of a bottleneck f: what it reads is in what it answers."""

    def __init__(self, bottleneck: Bottleneck):
        super().__init__()
        self.inner = bottleneck
        self.norm = nn.LayerNorm(bottleneck.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return _in_dtype_of(self.norm, F.gelu(self.inner(x)) + x)
