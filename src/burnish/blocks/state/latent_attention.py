"""Attention whose keys and values are made of one small state a token (MLA), cut out of another.

    q_h = [Q_h c_q](n) || rope([..](r)),  c_q = A_q x
    c = A x (R),   k_h = K_h c (n) || rope(A_r x) (r, one for all heads),   v_h = V_h c
    y = W_o concat_h softmax(q_h k^T / sqrt(n + r)) v_h

Kept for later tokens: c and the turned key, R + r numbers. Of a head's width D, r = D - n turn.
Letters: B batch, T tokens, H heads, G heads of keys before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: ranks are a whole number of times this
MULTIPLE = 8


class Latent(nn.Module):
    """See the module; its tensors are named as in DeepSeek's models, and in place of an attention
    that is given states, (cos, sin), a mask and a cache. W_o is the old one.

    Where later tokens are answered (fewer queries than keys) it works on c itself, ``q K`` in the
    place of q and V behind the sum, unless something stands on ``kv_b_proj``.
    """

    def __init__(self, old: nn.Module, heads: int, width: int, rope: int, ranks: tuple[int, int]):
        super().__init__()
        W: Tensor = old.q_proj.weight
        made = {"device": W.device, "dtype": W.dtype, "bias": False}
        self.heads, self.width, self.rope, (q, kv) = heads, width, rope, ranks
        self.rank, d = kv, W.shape[1]
        self.layer_idx = getattr(old, "layer_idx", 0)
        self.attention_dropout = getattr(old, "attention_dropout", 0.0)
        self.q_a_proj = nn.Linear(d, q, **made)
        self.q_b_proj = nn.Linear(q, heads * width, **made)
        self.kv_a_proj_with_mqa = nn.Linear(d, kv + rope, **made)
        self.kv_b_proj = nn.Linear(kv, heads * (2 * width - rope), **made)
        self.o_proj = old.o_proj

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
                attention_mask: Tensor | None = None, past_key_values: Any = None, **kw: Any
                ) -> tuple[Tensor, None]:
        turn = [_fewer(t, self.width, self.rope).unsqueeze(1) for t in position_embeddings]
        B, T, _ = hidden_states.shape
        n, r = self.width - self.rope, self.rope
        q = self.q_b_proj(self.q_a_proj(hidden_states)).view(B, T, self.heads, -1).transpose(1, 2)
        c, own = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split((self.rank, r), -1)
        q, own = torch.cat([q[..., :n], _turned(q[..., n:], *turn)], -1), _turned(own, *turn)
        if past_key_values is not None:
            c, own = past_key_values.update(c, own, self.layer_idx)
        form = self.absorbed if c.shape[2] > T and type(self.kv_b_proj) is nn.Linear \
            else self.expanded
        y = form(q, c, own, attention_mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), None

    def expanded(self, q: Tensor, c: Tensor, own: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T, D) of keys and values that are made of all c."""
        B, _, S, _ = c.shape
        kv = self.kv_b_proj(c.squeeze(1)).view(B, S, self.heads, -1).transpose(1, 2)
        k, v = kv.split((self.width - self.rope, self.width), -1)
        k = torch.cat([k, own.expand(-1, self.heads, -1, -1)], -1)
        return self.attend(q, k, v, mask)

    def absorbed(self, q: Tensor, c: Tensor, own: Tensor, mask: Tensor | None) -> Tensor:
        """The same on c itself."""
        n = self.width - self.rope
        W = self.kv_b_proj.weight.view(self.heads, -1, self.rank)
        q = torch.cat([q[..., :n] @ W[:, :n], q[..., n:]], -1)
        k = torch.cat([c, own], -1).expand(-1, self.heads, -1, -1)
        y = self.attend(q, k, c.expand(-1, self.heads, -1, -1), mask)
        return y @ W[:, n:].mT

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Of no mask, each token sees itself and what came before."""
        T, S = q.shape[2], k.shape[2]
        if mask is None and 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, mask, self.attention_dropout if self.training else 0.0,
            is_causal=mask is None and T > 1, scale=1 / math.sqrt(self.width))

    @staticmethod
    def count(d: int, heads: int, width: int, rope: int, q_rank: int, kv_rank: int) -> int:
        """Numbers in place of W_q, W_k and W_v."""
        return q_rank * (d + heads * width) + (kv_rank + rope) * d \
            + kv_rank * heads * (2 * width - rope)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _fewer(t: Tensor, width: int, rope: int) -> Tensor:
    """Angles' cosines (or sines) for `rope` numbers of those for `width`: every (width / rope)-th
    frequency, which are those that `rope` numbers have by themselves."""
    return t[..., : width // 2][..., :: width // rope].repeat(*[1] * (t.dim() - 1), 2)


# -- from another attention -----------------------------------------------------------------------
def decomposed(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T in fp32 or wider."""
    U, S, Vt = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)),
                                full_matrices=False)
    return U, S, Vt


def joint(k: Tensor, v: Tensor, heads: int, groups: int) -> Tensor:
    """[K; V] (2 H D, d) of weights whose heads of keys and values are repeated to H."""
    def every(W: Tensor) -> Tensor:
        return W.view(groups, -1, W.shape[1]).repeat_interleave(heads // groups, 0).flatten(0, 1)
    return torch.cat([every(k), every(v)])


def rank_of(S: Tensor, energy: float, power: float) -> int:
    """How many leading values hold no more than this share of the sum of their powers, one at
    least."""
    mass = S.double().pow(power).cumsum(0)
    return max(1, int((mass / mass[-1] <= energy).sum()))


def rounded(rank: int, most: int) -> int:
    """Up to a multiple of :data:`MULTIPLE`, but no more than there are."""
    return min(-(-rank // MULTIPLE) * MULTIPLE, most)


@torch.no_grad()
def converted(old: nn.Module, heads: int, groups: int, rope: int, ranks: tuple[int | None,
              int | None], energy: float, power: float) -> tuple[Latent, Mapping[str, float]]:
    """A latent attention in the place of one with q_proj, k_proj, v_proj and o_proj, and of both
    decompositions the root of what was cut off, ``sqrt(sum of the last sigma^2)``."""
    q, k, v = (getattr(old, f"{n}_proj").weight for n in "qkv")
    D = q.shape[0] // heads
    whole = {"q": decomposed(q), "kv": decomposed(joint(k, v, heads, groups))}
    found = tuple(rounded(rank or rank_of(S, energy, power), len(S))
                  for rank, (_, S, _) in zip(ranks, whole.values(), strict=True))
    made = Latent(old, heads, D, rope, (found[0], found[1]))
    (Uq, Sq, Vq), (U, S, V), n = whole["q"], whole["kv"], D - rope
    r_q, r = found
    made.q_a_proj.weight.copy_(Sq[:r_q].unsqueeze(1) * Vq[:r_q])
    made.q_b_proj.weight.copy_(Uq[:, :r_q])
    keys, values = U[:, :r].view(2, heads, D, r)
    own = k.view(groups, D, -1)[:, n:].to(S.dtype).mean(0)
    made.kv_a_proj_with_mqa.weight.copy_(torch.cat([S[:r].unsqueeze(1) * V[:r], own]))
    made.kv_b_proj.weight.copy_(torch.cat([keys[:, :n], values], 1).flatten(0, 1))
    return made, {"q": float(Sq[r_q:].square().sum().sqrt()),
                  "kv": float(S[r:].square().sum().sqrt())}
