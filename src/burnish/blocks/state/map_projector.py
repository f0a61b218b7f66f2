"""What stands between a backbone's map and a fixed head, and grows by one branch: Mamba-FSCIL's.

    f = branch_b(F) + R pool(F)  [+ branch_n(F)]        F (rows, channels, h, w), f (rows, width)

A branch: ``1x1 convolution to twice the channels, LayerNorm over all of it, leaky relu 0.1`` (twice
in branch_n), a 1x1 convolution to `width` without bias, plus a position (h w, width), four
selective scans (scanned.py), mean over places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scanned import FourWays, Scanned


class Branch(nn.Module):
    """(rows, channels, h, w) -> (rows, width), with what its scan was made of. silent: it answers 0
    until it has trained."""

    def __init__(self, shape: tuple[int, int, int], width: int, state: int, rank: int,
                 stages: int, silent: bool):
        super().__init__()
        c, h, w = shape
        parts: list[nn.Module] = []
        for i in range(stages):
            parts += [nn.Conv2d(2 * c if i else c, 2 * c, 1), nn.LayerNorm([2 * c, h, w]),
                      nn.LeakyReLU(0.1)]
        self.widen = nn.Sequential(*parts, nn.Conv2d(2 * c, width, 1, bias=False))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(h, w, width), std=0.02))
        self.scan = FourWays(width, state, rank, silent)

    def forward(self, maps: Tensor) -> tuple[Tensor, Scanned]:
        seen = self.scan(self.widen(maps).permute(0, 2, 3, 1) + self.position)
        return seen.y.mean(1), seen


class Projector(nn.Module):
    """One branch and a matrix R, and from :meth:`grow` on a second branch, which leaves what is
    answered as it was."""

    later: Branch | None

    def __init__(self, shape: tuple[int, int, int], width: int, state: int, rank: int):
        super().__init__()
        self.made = (shape, width, state, rank)
        self.first = Branch(*self.made, stages=1, silent=False)
        self.pooled = nn.Linear(shape[0], width, bias=False)
        self.later = None

    def grow(self) -> None:
        like = self.pooled.weight
        self.later = Branch(*self.made, stages=2, silent=True).to(like.device, like.dtype)

    def forward(self, maps: Tensor) -> tuple[Tensor, list[Scanned]]:
        """f, and what each branch's scan was made of."""
        f, seen = self.first(maps)
        f, found = f + self.pooled(maps.mean((2, 3))), [seen]
        if self.later is not None:
            more, seen = self.later(maps.detach())
            f, found = f + more, [*found, seen]
        return f, found


def class_sensitive(seen: list[Scanned], novel: Tensor, weights: tuple[float, float, float],
                    cap: float = 1.0) -> Tensor:
    """What has the last branch be quiet on old classes and speak on new ones, and the two read
    differently.

        n_b |z_old| / size - n_v |z_new| / size + n_s sum mean|I - S|

    z: what the last branch's scan answers before its gate; S the 2 x 2 cosines of the means over
    old and over new rows of Delta, B and C of every branch. weights: n_b, n_v, n_s. novel: (rows,)
    bool. Nothing where one side is absent. The second term has no bound from below, so it counts
    up to a root mean square of `cap`.
    """
    last = seen[-1].z
    if not novel.any() or novel.all():
        return last.new_zeros(())
    old, new = last[~novel], last[novel]
    most = cap * new.numel()**0.5
    out = weights[0] * _length(old) / old.numel() - \
        weights[1] * _length(new).clamp(max=most) / new.numel()
    for one in seen:
        for t in (one.delta, one.B, one.C):
            cosine = F.cosine_similarity(t[~novel].mean(0).flatten(), t[novel].mean(0).flatten(),
                                         dim=0)
            out = out + weights[2] * cosine.abs() / 2        # the diagonal of I - S is nothing
    return out


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x)
