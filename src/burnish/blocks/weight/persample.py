"""Norms of each sample's own gradient, without the gradients (for privacy and for selection).

A linear's gradient is a product, ``dW_b = sum_t g_t x_t^T`` over the tokens of sample b. Its
squared norm needs no product of that size: ``||dW_b||_F^2 = sum_{t,u} (x_t . x_u)(g_t . g_u)``
(the ghost norm), T^2 numbers per sample instead of out x in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: entries of one panel of a sample's gradient
PANEL = 1 << 22


def product_norms(a_BTM: Tensor, b_BTN: Tensor) -> Tensor:
    """``||sum_t a_t b_t^T||_F^2`` per sample, (B,), by whichever form is smaller."""
    T, M, N = a_BTM.shape[1], a_BTM.shape[2], b_BTN.shape[2]
    wide = torch.promote_types(torch.promote_types(a_BTM.dtype, b_BTN.dtype), torch.float32)
    out = []
    for a, b in zip(a_BTM.to(wide), b_BTN.to(wide), strict=True):
        if T * T <= M * N:
            out.append(((a @ a.t()) * (b @ b.t())).sum())
        else:
            out.append((a.t() @ b).square().sum())
    return torch.stack(out) if out else a_BTM.new_zeros(0, dtype=wide)


def sum_norms(g_BTO: Tensor) -> Tensor:
    """``||sum_t g_t||^2`` per sample: a bias's."""
    return g_BTO.sum(1, dtype=torch.promote_types(g_BTO.dtype, torch.float32)).square().sum(-1)


def term_norms(term: Any, x_BTI: Tensor, g_BTO: Tensor) -> list[Tensor | None]:
    """Squared norms (B,) per tensor of ``term.theta()``, sample by sample: for any term."""
    rows = [_gradients(term, x, g) for x, g in zip(x_BTI, g_BTO, strict=True)]
    return [torch.stack([g_BTO.new_zeros(()) if r[k] is None else r[k].square().sum()
                         for r in rows]) if t.requires_grad else None
            for k, t in enumerate(term.theta())]


def _gradients(term: Any, x_NI: Tensor, g_NO: Tensor) -> list[Tensor | None]:
    """One sample's gradients, per tensor of ``theta()``."""
    if term.tokenwise:
        kept = term.forward_(x_NI, torch.zeros_like(g_NO), 1.0)
        return term.backward_(g_NO, x_NI, kept, None, 1.0)
    grads: list[Tensor | None] = [None] * len(term.theta())
    state, inp = term.prepare(), x_NI.shape[1]
    step = max(1, PANEL // g_NO.shape[1]) if term.tiled else inp
    for i in range(0, inp, step):
        term.pull(i, min(inp, i + step), g_NO.t() @ x_NI[:, i : i + step], state, grads)
    return grads
