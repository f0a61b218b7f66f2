"""Prompts that a bank of features recalls, and an adapter that goes by where tokens stand.

    C = [q; sum_k w_k M_k; M_k1 .. M_kK],   w = softmax of the K largest of cos(q, M_n)
    P = dropout(E) + C + f(C)                           behind a block's special tokens
    n_jk <- n_jk + A(norm(n_jk)),   v_j = gelu(BN(max_k n_jk)) + share x_j
    x_i <- x_i + share sum_j w_ij v_j,   w_ij ~ 1 / (|p_i - p_j|^2 + 1e-8),   x <- x + f_2(x)

q is what the frozen network says of a cloud, M what it said of those it was shown before.

Letters: B clouds, N features of the bank, K of them recalled, L = K + 2, T tokens, G groups,
M centres, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import resume
from ...core.errors import DataError, RecipeError
from ..linalg import truncated_normal_
from .attending import SDPA, Attending, named
from .bottleneck import Bottleneck
from .clouds import between, noted, spread
from .coordinator import Heard
from .prompts import Listener
from .prompts import named as of_call
from .taps import evaluating

#: what is gathered counts so much; width of the attention within a group; keeps 1 / 0 away
SHARE, INNER, _EPSILON = 0.3, 18, 1e-8


def said(h: Tensor, after: int) -> Tensor:
    """(B, D): the class token, where there is one, plus the largest of the tokens of points."""
    most = h[:, after:].amax(1)
    return h[:, 0] + most if after else most


class Bank(nn.Module):
    """Up to `size` features (D), of unit length, in half precision."""

    rows: Tensor
    filled: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width, dtype=torch.float16))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def take(self, features: Tensor) -> None:
        """Some more, as many as there is room for."""
        n = int(self.filled)
        some = F.normalize(features.float(), dim=-1)[: len(self.rows) - n]
        self.rows[n : n + len(some)] = some.to(self.rows)
        self.filled += len(some)

    @property
    def full(self) -> bool:
        return int(self.filled) == len(self.rows)

    def nearest(self, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(cosines (B, k), rows (B, k)) of the features nearest to q (B, D)."""
        like = F.normalize(q, dim=-1) @ self.rows.to(q.dtype).mT
        empty = torch.arange(len(self.rows), device=q.device) >= self.filled
        top = like.masked_fill(empty, -2).topk(k)          # below any cosine
        return top.values, top.indices

    def recall(self, q: Tensor, k: int) -> Tensor:
        """C (B, k + 2, D)."""
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        like, at = self.nearest(wide, k)
        rows = self.rows[at].to(wide.dtype)
        mean = (like.softmax(-1).unsqueeze(1) @ rows)
        return torch.cat([wide.unsqueeze(1), mean, rows], 1).to(q.dtype)


class Recalled(Listener):
    """Listens to the model: C of its input is noted, by a run with nothing of the recipe."""

    def __init__(self, state: Any, adapter: str, bank: Bank, k: int, after: int):
        super().__init__(state, adapter)
        self.bank, self.k, self.after = bank, k, after

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        here = self.here
        own = here.inner(off=True, base=self.state.base_of(module))
        with torch.no_grad(), evaluating([m for m in module.modules() if m.training]), resume(own):
            call(*args, **kw)
            out = own.box.pop(Heard)
            q = said(out[0] if isinstance(out, tuple) else out, self.after)
        here.noted["recalled", self.adapter] = self.bank.recall(q, self.k)
        return call(*args, **kw)


class Near(Attending):
    """Listens to an attention: tokens of points further apart than `sight` do not see each other;
    the tokens before them see all, and are seen."""

    part = "point_peft"

    def __init__(self, state: Any, adapter: str, sight: float):
        super().__init__(state, adapter)
        self.sight = sight

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        given = named(args, kwargs)
        if given.get("attn_mask") is not None or given.get("is_causal"):
            raise RecipeError(f"point_peft(sight={self.sight}) says which points see each other, "
                              f"and {type(module).__name__} has a mask of its own: sight=None")
        c, T = noted(("centres", self.adapter), self.part), given["query"].shape[-2]
        near = between(c, c) <= self.sight ** 2
        G = near.shape[-1]
        given["attn_mask"] = F.pad(near, (T - G, 0, T - G, 0), value=True).unsqueeze(1)
        return SDPA(**given)


class Within(nn.Module):
    """What all blocks share: an attention of width 18 within a group, and where prompts stand."""

    def __init__(self, width: int, length: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * INNER, bias=False)
        self.proj = nn.Linear(INNER, width, bias=False)    # the batch norm would take it away
        self.places = nn.Parameter(2 * torch.rand(length, 3) - 1)

    def forward(self, n: Tensor) -> Tensor:
        q, k, v = self.qkv(n).chunk(3, -1)
        return self.proj((q @ k.mT / INNER ** 0.5).softmax(-1) @ v)


class Geometry(nn.Module):
    """x of tokens (B, T, D) that stand at p (B, T, 3)."""

    def __init__(self, shared: Within, owns: bool, width: int, bottleneck: int, neighbours: int,
                 centres: int | None):
        super().__init__()
        if owns:
            self.shared = shared
        else:
            self.__dict__["shared"] = shared
        self.neighbours, self.centres = neighbours, centres
        self.norm, self.batch_norm = nn.LayerNorm(width), nn.BatchNorm1d(width)
        self.bottleneck = Bottleneck(width, bottleneck, act="quick_gelu", init="xavier")

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another block holds, for whoever runs this again in backward."""
        return () if "shared" in self._modules else tuple(self.shared.parameters())

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.norm.weight.dtype)
            found = self.gathered(wide, p.to(torch.promote_types(p.dtype, torch.float32)))
            return (x + SHARE * found.to(x.dtype)) + self.bottleneck(
                x + SHARE * found.to(x.dtype))

    def gathered(self, x: Tensor, p: Tensor) -> Tensor:
        """sum_j w_ij v_j, (B, T, D)."""
        sample = torch.arange(len(x), device=x.device).unsqueeze(1)
        at = spread(p.detach(), min(self.centres or x.shape[1] // 2, x.shape[1]))
        here = p[sample, at]
        k = min(self.neighbours, x.shape[1])
        near = between(here.detach(), p.detach()).topk(k, largest=False).indices
        n = x[sample.unsqueeze(1), near]
        n = n + self.shared(self.norm(n))
        most = self.batch_norm(n.amax(2).flatten(0, 1)).unflatten(0, near.shape[:2])
        v = F.gelu(most) + SHARE * x[sample, at]
        share = 1 / (between(p, here) + _EPSILON)
        return (share / share.sum(-1, keepdim=True)).to(x.dtype) @ v


class Prompted(nn.Module):
    """``P = dropout(E) + C + f(C)``, (B, L, D) of C."""

    def __init__(self, length: int, width: int, bottleneck: int, dropout: float):
        super().__init__()
        self.rows = nn.Parameter(truncated_normal_(torch.empty(length, width), 0.02))
        self.bottleneck = Bottleneck(width, bottleneck, act="quick_gelu", init="xavier")
        self.dropout = dropout

    def forward(self, c: Tensor) -> Tensor:
        rows = F.dropout(self.rows, self.dropout, self.training).to(c.dtype)
        return rows + c + self.bottleneck(c)


class Placed(Listener):
    """Listens to a block: prompts enter behind its first `after` tokens, where it has any, the
    geometry adapter follows, prompts leave."""

    what = "point_peft"

    def __init__(self, state: Any, adapter: str, after: int, prompts: Prompted | None,
                 geometry: Geometry):
        super().__init__(state, adapter)
        self.after, self.prompts, self.geometry = after, prompts, geometry

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        name, x = (None, args[0]) if args else next(iter(kw.items()))
        c, a = noted(("centres", self.adapter), self.what), self.after
        if x.dim() != 3 or x.shape[1] != a + c.shape[1] or \
                of_call(module, args, kw).get("attention_mask") is not None:
            raise RecipeError(f"point_peft adapts {a} and {c.shape[1]} tokens without a mask; "
                              f"{type(module).__name__} is given {tuple(x.shape)}")
        places = c
        if self.prompts is not None:
            p = self.prompts(noted(("recalled", self.adapter), self.what).to(x.dtype))
            x = torch.cat([x[:, :a], p, x[:, a:]], 1)
            own = self.geometry.shared.places
            places = torch.cat([own.to(c.dtype).expand(len(c), -1, -1), c], 1)
        out = call(x, *args[1:], **kw) if name is None else call(**{**kw, name: x})
        h = out[0] if isinstance(out, tuple) else out
        moved = self.geometry(h[:, a:], places)
        h = torch.cat([h[:, :a], moved[:, moved.shape[1] - c.shape[1] :]], 1)
        return (h, *out[1:]) if isinstance(out, tuple) else h


def enough(bank: Bank, k: int) -> None:
    """DataError where a bank holds fewer features than are recalled."""
    if int(bank.filled) < k:
        raise DataError(f"point_peft recalls {k} features, and its bank was shown "
                        f"{int(bank.filled)} clouds: give tune(..., calibration=batches) more of "
                        "the training data, or recall fewer")
