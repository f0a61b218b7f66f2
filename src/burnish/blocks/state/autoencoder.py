"""A sparse autoencoder of hidden states, and states with some of its features damped.

    f = act(W_e (h - b_d) + b_e)        act: ReLU, of which the `active` largest stay (0: all)
    g = W_d f + b_d                     g is to be h; columns of W_d have length one

Letters: N tokens, D width, M features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SparseAutoencoder(nn.Module):
    """``2 D M + M + D`` numbers; see above."""

    def __init__(self, width: int, features: int, active: int = 0, seed: int = 0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        W = torch.randn(width, features, generator=g)
        self.W_d = nn.Parameter(W / W.norm(dim=0))
        self.W_e = nn.Parameter(self.W_d.detach().t().clone())
        self.b_e, self.b_d = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(width))
        self.active = active

    def encode(self, h_ND: Tensor) -> Tensor:
        """f, (N, M), none below 0."""
        f = torch.relu((h_ND - self.b_d) @ self.W_e.t() + self.b_e)
        if not 0 < self.active < f.shape[-1]:
            return f
        top = f.topk(self.active, dim=-1)
        return torch.zeros_like(f).scatter(-1, top.indices, top.values)

    def decode(self, f_NM: Tensor) -> Tensor:
        """g, (N, D)."""
        return f_NM @ self.W_d.t() + self.b_d

    def loss(self, h_ND: Tensor, l1: float) -> Tensor:
        """``mean (h - g)^2 + l1 mean_n sum_m f``."""
        f = self.encode(h_ND)
        return (h_ND - self.decode(f)).square().mean() + l1 * f.sum(-1).mean()

    @torch.no_grad()
    def unit(self) -> None:
        """Columns of W_d have length one again."""
        self.W_d /= self.W_d.norm(dim=0).clamp_min(1e-12)


def damped(sae: SparseAutoencoder, h: Tensor, which: Sequence[int], strength: float,
           threshold: float) -> Tensor:
    """``h + sum over j in which of (strength - 1) f_j W_d[:, j]`` where f_j is above `threshold`;
    tokens of which no feature is, bit for bit as they were. Strength 1 changes nothing."""
    if not which or strength == 1:
        return h
    at = torch.as_tensor(sorted(set(which)), device=h.device)
    flat = h.reshape(-1, h.shape[-1]).to(sae.W_d.dtype)
    f = sae.encode(flat)[:, at]
    f = torch.where(f > threshold, f, 0)
    moved = (flat + (strength - 1) * f @ sae.W_d[:, at].t()).to(h.dtype)
    touched = (f > 0).any(-1, keepdim=True)
    return torch.where(touched, moved, h.reshape(-1, h.shape[-1])).view_as(h)
