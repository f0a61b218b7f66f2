"""Other laboratories' models as plain modules: published shapes, their order of operations.

Nothing of burnish is inside, and no published code: each graph is written from what its authors
describe, so that ``as_is + lean(on=False)`` simulates *their* step. Letters: B samples, T tokens,
D width, H heads, G key-value heads, V words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """``y = w x / rms(x)`` in elementary operations; `single`: computed in fp32; `back`: rounded
    before the weight, not after it."""

    def __init__(self, width: int, single: bool, back: bool = False):
        super().__init__()
        self.weight, self.single, self.back = nn.Parameter(torch.empty(width)), single, back

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.single:
            x = x.float()
        normal = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        if self.back:
            return normal.to(dtype) * self.weight
        return (normal * (self.weight.float() if self.single else self.weight)).to(dtype)


class Low(nn.Module):
    """``y = x W^T + s drop(x) A^T B^T``, written out."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float):
        super().__init__()
        self.base, self.dropout = base.requires_grad_(False), dropout
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        added = F.dropout(x, self.dropout, self.training) @ self.a.t() @ self.b.t()
        return self.base(x) + added * 0.5


class LowFused(nn.Module):
    """LoRA on some of the rows of a fused qkv: A of all in one product, B as grouped 1 x 1
    convolutions, the rest of the rows filled with zeros.

    rows: the row counts of q, k and v; on: which of them; copies: zeros are filled out of place.
    """

    def __init__(self, base: nn.Linear, rank: int, dropout: float, rows: tuple[int, int, int],
                 on: tuple[bool, bool, bool], copies: bool):
        super().__init__()
        self.base, self.dropout, self.copies = base.requires_grad_(False), dropout, copies
        self.rows, self.on = rows, on
        self.some = [n for n, use in zip(rows, on, strict=True) if use]
        self.a = nn.Parameter(torch.empty(rank * len(self.some), base.in_features))
        self.b = nn.Parameter(torch.empty(sum(self.some), rank))
        starts = (0, rows[0], rows[0] + rows[1])
        self.register_buffer("filled", torch.cat([
            torch.arange(s, s + n) for s, n, use in zip(starts, rows, on, strict=True) if use]),
            persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.a).transpose(-2, -1)
        weight = self.b.unsqueeze(-1)
        if len(set(self.some)) == 1:
            added = F.conv1d(low, weight, groups=len(self.some))
        else:
            parts = zip(low.chunk(len(self.some), 1), weight.split(self.some), strict=True)
            added = torch.cat([F.conv1d(a, b) for a, b in parts], 1)
        return y + self._spread(added.transpose(-2, -1), y.shape[-1]) * 0.5

    def _spread(self, added: Tensor, out: int) -> Tensor:
        if all(self.on):
            return added
        if self.copies:
            zeros = added.new_zeros(added.shape[0] * added.shape[1], out)
            return zeros.index_copy(1, self.filled, added.reshape(-1, added.shape[-1])).view(
                *added.shape[:-1], out)
        return added.new_zeros(*added.shape[:-1], out).index_copy_(-1, self.filled, added)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.heads, self.groups, self.size = c["heads"], c["groups"], c["head_size"]
        self.turned = int(c["rotary"] * self.size)
        rows = (self.heads * self.size, self.groups * self.size, self.groups * self.size)
        self.rows = rows
        self.qkv: nn.Module = nn.Linear(c["width"], sum(rows), bias=c["bias"] or c["qkv_bias"])
        self.proj: nn.Module = nn.Linear(rows[0], c["width"], bias=c["bias"])
        if (lora := c["lora"]) is not None:
            on = tuple(w in lora["on"] for w in "qkv")
            if any(on):
                self.qkv = LowFused(self.qkv, lora["rank"], lora["dropout"], rows, on,
                                    lora.get("copies", False))
            if "o" in lora["on"]:
                self.proj = Low(self.proj, lora["rank"], lora["dropout"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).split(self.rows, -1)
        q = q.view(b, t, self.heads, self.size).transpose(1, 2)
        k, v = (z.view(b, t, self.groups, self.size).transpose(1, 2) for z in (k, v))
        n = self.turned
        q, k = (torch.cat((rotate(z[..., :n], cos, sin), z[..., n:]), -1) for z in (q, k))
        if self.groups != self.heads:
            k, v = (z.repeat_interleave(self.heads // self.groups, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """``down(act(gate x) * up x)``, or two matrices with a GELU between them."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        lora = c["lora"] if c["lora"] is not None and "mlp" in c["lora"]["on"] else None
        self.act = c["act"]
        self.up, self.gate, self.down = (_linear(c["width"], c["inner"], c["bias"], lora),
                                         _linear(c["width"], c["inner"], c["bias"], lora)
                                         if c["gated"] else None,
                                         _linear(c["inner"], c["width"], c["bias"], lora))

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh" if self.act == "gelu_tanh"
                                    else "none"))
        gate, up = self.gate(x), self.up(x)
        gate = F.silu(gate) if self.act == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(gate * up)


class Block(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.parallel = c["parallel"]
        self.norm_1 = _norm(c)
        self.attention = Attention(c)
        self.norm_2 = None if c["shared_norm"] else _norm(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normal = self.norm_1(x)
        made = self.attention(normal, cos, sin)
        if self.parallel:
            if self.norm_2 is not None:
                normal = self.norm_2(x)
            return self.mlp(normal) + (made + x)
        x = made + x
        return self.mlp(self.norm_2(x)) + x


class Decoder(nn.Module):
    """A decoder whose call returns the loss of its labels.

    words, width, layers, heads, inner; groups (key-value heads; default heads), head_size (default
    width / heads); rotary: share of a head that is turned; table: dtype of its cosines; norm:
    "rms", "rms32" (in fp32), "rms32_back" (rounded before its weight), "layer"; gated, act; bias,
    qkv_bias, head_bias; parallel, shared_norm; tied.
    shift: what is cut for the next word, "logits" (a copy) or "labels".
    chunk: tokens of the head and of the loss at once; single: logits become fp32; held: they live
    until the next batch's.
    lora: rank, dropout, on (q, k, v, o, mlp, head).
    """

    BASE = {"groups": None, "head_size": None, "rotary": 1.0, "table": "float32", "norm": "rms",
            "gated": True, "act": "silu", "bias": False, "qkv_bias": False, "head_bias": False,
            "parallel": False, "shared_norm": False, "tied": False, "shift": "logits", "chunk": 0,
            "single": False, "held": False, "lora": None, "length": 0}

    def __init__(self, **shape: Any):
        super().__init__()
        c = {**self.BASE, **shape}
        c["groups"] = c["groups"] or c["heads"]
        c["head_size"] = c["head_size"] or c["width"] // c["heads"]
        self.c = c
        self.embedding = nn.Embedding(c["words"], c["width"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.norm = _norm(c)
        head_lora = c["lora"] if c["lora"] is not None and "head" in c["lora"]["on"] else None
        self.head = _linear(c["width"], c["words"], c["head_bias"], head_lora)
        if c["tied"]:
            self.head.weight = self.embedding.weight
        turned = int(c["rotary"] * c["head_size"])
        for name in ("cos", "sin"):
            table = torch.empty(c["length"], turned, dtype=getattr(torch, c["table"]))
            self.register_buffer(name, table, persistent=False)
        if c["lora"] is not None:
            for name, p in self.named_parameters():
                p.requires_grad_(name.endswith((".a", ".b")))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        c, t = self.c, input_ids.shape[1]
        x = self.embedding(input_ids)
        cos, sin = self.cos[:t], self.sin[:t]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        step = c["chunk"] or t
        logits = [self.head(part) for part in x.split(step, 1)]
        if c["single"]:
            logits = [part.float() for part in logits]
        if c["held"]:                         # by a name of the loop, until the next ones are there
            self.logits = logits
        if c["shift"] == "logits":
            logits[-1] = logits[-1][..., :-1, :]
            labels = labels[..., 1:]
        else:
            labels = torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], -100)), -1)
        wanted = labels.split(step, 1)
        if not c["chunk"]:
            return F.cross_entropy(logits[0].reshape(-1, c["words"]), wanted[0].reshape(-1))
        losses = [F.cross_entropy(a.reshape(-1, c["words"]), b.reshape(-1), reduction="none")
                  for a, b in zip(logits, wanted, strict=True)]
        each = torch.cat(losses)
        return each.mean() if c["shift"] == "logits" else each.sum() / (labels != -100).sum()


def _norm(c: dict[str, Any]) -> nn.Module:
    return nn.LayerNorm(c["width"]) if c["norm"] == "layer" else Norm(
        c["width"], c["norm"].startswith("rms32"), c["norm"].endswith("back"))


def _linear(inp: int, out: int, bias: bool, lora: dict[str, Any] | None) -> Any:
    made = nn.Linear(inp, out, bias=bias)
    return made if lora is None else Low(made, lora["rank"], lora["dropout"])
