"""Attention as a local part that is exact and a rest that is estimated by random features.

    out_i = sum_j p_ij v_j,  p_ij ~ exp(t q_i . k_j) near, ~ phi(q_i) . phi(k_j) elsewhere

    phi(x) = exp(+-O x sqrt(t) - t |x|^2 / 2) / sqrt(2 M)       E[phi(q) . phi(k)] = exp(t q . k)

Near are a token's own window and the ones beside it. Sums over what lies before and behind them
come from running sums over windows, so nothing is subtracted and nothing of tokens x tokens is
made. Exponents stand below the largest of a query and of all keys; the two parts meet as logarithms
of their sums.

Letters: B batch, H heads, T tokens, W windows of w tokens, h width of a head, M rows of O.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ...core.followed import is_fake
from ..tape.replay import dropout
from ..update.noise import CounterNoise
from .attending import Attending, named

#: the logarithm of nothing: finite, so that no gradient is not a number
NOTHING = -1e30
#: a number of a mask below it hides a key
CLOSED = -1e4
#: a sum below it counts as nothing
LEAST = 1e-24


def features(x: Tensor, omega: Tensor, t: float) -> Tensor:
    """log phi(x), (..., 2 M): both signs side by side."""
    wx = x @ omega.t() * math.sqrt(t)
    norm = x.square().sum(-1, keepdim=True) * (t / 2) + 0.5 * math.log(2 * len(omega))
    return torch.cat([wx, -wx], -1) - norm


def scattered(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, window: int, scale: float,
              causal: bool = False, valid: Tensor | None = None, p: float = 0.0) -> Tensor:
    """(B, H, T, h) from queries, keys and values of that shape.

    valid: (B, T), False for keys that are padding. p: dropout on the exact part.
    """
    T, dtype = q.shape[2], q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    more = -T % window
    q, k, v = (F.pad(x.to(wide), (0, 0, 0, more)).unflatten(-2, (-1, window)) for x in (q, k, v))
    omega, W = omega.to(wide), q.shape[2]
    there = torch.ones(1, T, dtype=torch.bool, device=q.device) if valid is None else valid
    there = F.pad(there, (0, more)).view(len(there), 1, W, window)

    s, vs = _near(q, k, v, there, scale, causal)
    exact = s.logsumexp(-1, keepdim=True)
    rest, shift = _rest(q, k, v, there, omega, scale, causal)
    if rest is None:
        weights = (s - exact).exp()
        out = (dropout(weights, p) if p else weights) @ vs
    else:
        num, z = rest
        far = torch.where(z > LEAST, z.clamp_min(LEAST).log() + shift, NOTHING)
        whole = torch.logaddexp(exact, far)
        weights = (s - whole).exp()
        out = (dropout(weights, p) if p else weights) @ vs
        out = out + (far - whole).exp() * num / z.clamp_min(LEAST)
    return out.flatten(-3, -2)[..., :T, :].to(dtype)


def _near(q: Tensor, k: Tensor, v: Tensor, there: Tensor, scale: float, causal: bool
          ) -> tuple[Tensor, Tensor]:
    """(t q . k of the windows near, NOTHING where no key is to be seen, their values): (B, H, W, w,
    n w) and (B, H, W, n w, h), n = 3, or 2 where nothing behind is seen."""
    w = q.shape[3]
    ks, vs, seen = (torch.cat([_before(x), x] if causal else [_before(x), x, _behind(x)], 3)
                    for x in (k, v, there))
    s = (q @ ks.transpose(-1, -2)) * scale
    mask = seen.unsqueeze(-2)
    if causal:
        at = torch.arange(w, device=q.device)
        mask = mask & torch.cat([torch.ones_like(at, dtype=torch.bool).expand(w, w),
                                 at <= at.unsqueeze(1)], 1)
    return s.masked_fill(~mask, NOTHING), vs


def _before(x: Tensor) -> Tensor:
    """Of each window what the one before it has, zeros (False) of the first: (B, H, W, ...)."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)


def _behind(x: Tensor) -> Tensor:
    """Of each window what the one behind it has."""
    return torch.cat([x[:, :, 1:], torch.zeros_like(x[:, :, :1])], 2)


def _rest(q: Tensor, k: Tensor, v: Tensor, there: Tensor, omega: Tensor, scale: float, causal: bool
          ) -> tuple[tuple[Tensor, Tensor] | None, Any]:
    """((sum of phi(q) . phi(k_j) v_j, sum of phi(q) . phi(k_j)) over the windows that are not near,
    the logarithm of what both are to be multiplied by); None where all windows are near."""
    if q.shape[2] <= 2:
        return None, None
    a, b = features(q, omega, scale), features(k, omega, scale)
    b = b.masked_fill(~there.unsqueeze(-1), NOTHING)
    top_q = a.detach().amax(-1, keepdim=True)
    top_k = b.detach().amax((-3, -2, -1), keepdim=True)
    fq, fk = (a - top_q).exp(), (b - top_k).exp()
    far = [_running(x, causal) for x in (fk.transpose(-1, -2) @ v, fk.sum(-2).unsqueeze(-1))]
    return (fq @ far[0], fq @ far[1]), top_q + top_k


def _running(x: Tensor, causal: bool) -> Tensor:
    """Of each window the sum over those before the one before it, and (unless causal) over those
    behind the one behind it: (B, H, W, ...)."""
    before = _before(_before(x.cumsum(2)))
    if causal:
        return before
    return before + _behind(_behind(x.flip(2).cumsum(2).flip(2)))


class Scattered(Attending):
    """Answers for ``F.scaled_dot_product_attention`` within one attention.

    rows: of O, 0: h ln h.  turn: another draw of O for another number.
    Queries of another number than keys (a cache, another sequence) are left to the exact attention.
    """

    part = "scatterbrain"

    def __init__(self, state: Any, adapter: str, noise: CounterNoise, rows: int, window: int):
        super().__init__(state, adapter)
        self.noise, self.rows, self.window, self.turn = noise, rows, window, 0

    def omega(self, h: int, device: torch.device) -> Tensor:
        """O, (M, h): the same in every forward of a turn, held nowhere."""
        rows = self.rows or max(1, round(h * math.log(h)))
        return self.noise.normal(rows * h, turn=self.turn, device=device).view(rows, h)

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        """The function's answer, near exactly and elsewhere estimated."""
        given = named(args, kwargs)
        q, k, v = given["query"], given["key"], given["value"]
        if q.dim() != 4 or q.shape[2] != k.shape[2] or q.shape[2] <= 2 * self.window:
            return func(*args, **kwargs)                 # few tokens are all near
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mask = given.get("attn_mask")
        causal = bool(given.get("is_causal"))
        valid = None
        if mask is not None:
            causal = bool(getattr(module, "is_causal", False))
            valid = seen(mask, causal, self.here.valid, q.shape[2])
        scale = given.get("scale") or q.shape[-1] ** -0.5
        with torch.autocast(q.device.type, enabled=False):
            return scattered(q, k, v, self.omega(q.shape[-1], q.device), self.window, scale,
                             causal, valid, given.get("dropout_p", 0.0))


def seen(mask: Tensor, causal: bool, valid: Tensor | None, T: int) -> Tensor | None:
    """Which keys are no padding, (B, T), or None, where a mask says no more than that and, with
    `causal`, that no token sees a later one. RecipeError where it says anything else."""
    valid = None if valid is None or valid.shape[-1] != T else valid.bool()
    if is_fake(mask):
        return valid
    open_ = mask if mask.dtype == torch.bool else mask > CLOSED
    flat = mask.dtype == torch.bool or not bool((mask[open_] != 0).any())
    rows = torch.ones(T, T, dtype=torch.bool, device=mask.device)
    wanted = rows.tril() if causal else rows
    if valid is not None:
        wanted = wanted & valid[:, None, None, :] | ~valid[:, None, :, None]
        open_ = open_ | ~valid[:, None, :, None]
    if not flat or not bool((open_ == wanted).all()):
        raise RecipeError("scatterbrain: this model masks attention by more than padding and "
                          "order (windows, packed sequences, biases), which its windows would not "
                          "follow")
    return valid
