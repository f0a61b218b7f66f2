"""Plain PyTorch models that memory tests count on: nothing of burnish inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, MLP = 96, 4, 384


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int, train_a: bool = True):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.02, requires_grad=train_a)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.t()) @ self.b.t()


class Delta(nn.Module):
    """The naive dense update: W + D is a tensor that waits for backward."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros_like(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.delta, self.base.bias)


class Adapter(nn.Module):
    def __init__(self, d: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(d, rank), nn.Linear(rank, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))


class _FusedRMSNorm(torch.autograd.Function):
    """y = g x / rms(x), keeping x and one number per token (the CPU has no fused kernel)."""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = x.float().square().mean(-1, keepdim=True).add_(1e-5).rsqrt_()
        ctx.save_for_backward(x, rstd, weight)
        return (x * rstd * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, rstd, weight = ctx.saved_tensors
        h = x * rstd
        gw = (g * h).flatten(0, -2).sum(0).to(weight.dtype)
        g = g * weight
        return (rstd * (g - h * (g * h).mean(-1, keepdim=True))).to(x.dtype), gw


class RMSNorm(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return _FusedRMSNorm.apply(x, self.weight)


class Block(nn.Module):
    """norm, attention, residual, norm, MLP, residual. Adapters sit where `extra` says."""

    def __init__(self, d: int = D, heads: int = HEADS, mlp: int = MLP, eager: bool = False,
                 kv_heads: int | None = None):
        super().__init__()
        self.heads, self.kv, self.eager = heads, kv_heads or heads, eager
        kv = d // heads * self.kv
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, kv), nn.Linear(d, kv)
        self.o = nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, mlp), nn.Linear(mlp, d)
        self.after_attention: nn.Module | None = None
        self.after_mlp: nn.Module | None = None
        self.beside_mlp: nn.Module | None = None
        self.scales: nn.ParameterList | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.eager:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv != self.heads)
        p = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        return p @ v

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.scales is not None:
            k, v = k * self.scales[0], v * self.scales[1]
        q, k, v = (t.view(b, n, -1, d // self.heads).transpose(1, 2) for t in (q, k, v))
        h = self.o(self.attend(q, k, v).transpose(1, 2).reshape(b, n, d))
        x = x + (self.after_attention(h) + h if self.after_attention is not None else h)
        h = self.norm2(x)
        m = F.gelu(self.fc1(h))
        if self.scales is not None:
            m = m * self.scales[2]
        y = self.fc2(m)
        if self.after_mlp is not None:
            y = self.after_mlp(y) + y
        if self.beside_mlp is not None:
            y = y + self.beside_mlp(h)
        return x + y


class Gated(nn.Module):
    """The Llama-like block: fused RMSNorm, grouped keys and values, eager SwiGLU."""

    def __init__(self, d: int = D, heads: int = HEADS, mlp: int = MLP, kv_heads: int | None = None):
        super().__init__()
        self.heads, self.kv = heads, kv_heads or heads
        kv = d // heads * self.kv
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.q, self.k, self.v = (nn.Linear(d, n, bias=False) for n in (d, kv, kv))
        self.o = nn.Linear(d, d, bias=False)
        self.gate, self.up = nn.Linear(d, mlp, bias=False), nn.Linear(d, mlp, bias=False)
        self.down = nn.Linear(mlp, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, n, -1, d // self.heads).transpose(1, 2)
                   for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                           enable_gqa=self.kv != self.heads)
        x = x + self.o(a.transpose(1, 2).reshape(b, n, d))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Net(nn.Module):
    """Blocks, a mean over tokens, a head."""

    def __init__(self, blocks: int = 2, classes: int = 10, **kw):
        super().__init__()
        self.blocks = nn.ModuleList(Block(**kw) for _ in range(blocks))
        self.head = nn.Linear(kw.get("d", D), classes)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": F.cross_entropy(self.head(x.mean(1)), labels)}


def kept(run, weights) -> int:
    """Bytes of the distinct storages autograd saves in `run`, weights aside."""
    own = {w.untyped_storage()._cdata for w in weights}
    seen: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        key = t.untyped_storage()._cdata
        if key not in own:
            seen[key] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    total = sum(t.untyped_storage().nbytes() for t in seen.values())
    del out
    return total
