"""Features of an older encoder, moved to where a newer one has them.

    R  = argmin over rotations sum_i ||R (z0_i - m0) - (z_i - m)||^2       Kabsch: S = sum z0 z^T
                                                 = U D V^T, R = V diag(1, ..., det(V U^T)) U^T
    y_i = R (z0_i - m0) + m,    out_i = (y_i + t_c) / ||y_i + t_c||        c the class of i
    t_c = sum_i p_i z_i - mean_i y_i over class c,   p = softmax_i (z_i . w_c / ||w_c||)

z, z0 (K, D) of the same samples, m, m0 their means, w_c the head's row of class c. Directions that
the samples do not span stay as they are. Of all of a class t takes away what m0 and m would add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: of the largest singular value: below it a direction is none of the samples'
EMPTY = 1e-6


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """R (D, D), a proper rotation, of samples (K, D) of which one side is centred."""
    S = old.t() @ new
    floor = EMPTY * torch.linalg.matrix_norm(S) + torch.finfo(S.dtype).tiny
    U, _, Vh = torch.linalg.svd(S + floor * torch.eye(len(S), dtype=S.dtype, device=S.device))
    sign = torch.linalg.det(Vh.t() @ U.t()).sign()
    last = torch.ones(len(S), dtype=S.dtype, device=S.device)
    last[-1] = sign
    return (Vh.t() * last) @ U.t()


def shifted(y: Tensor, new: Tensor, member: Tensor, rows: Tensor) -> Tensor:
    """(K, D) t of each sample. member: (K, C) 1 where a sample is of a class. rows: (C, D) w."""
    many = member.sum(0)
    score = (new @ F.normalize(rows, dim=1).t()).masked_fill(member == 0, float("-inf"))
    p = torch.where(many > 0, score, torch.zeros_like(score)).softmax(0) * member      # (K, C)
    before = (member / many.clamp_min(1)).t() @ y
    return member @ (p.t() @ new - before)


class Pairs:
    """The last `room` samples: features of the new and of the old encoder, and the class."""

    def __init__(self, room: int):
        self.room, self.put = room, 0
        self.new: Tensor | None = None
        self.old: Tensor | None = None
        self.label: Tensor | None = None

    def __len__(self) -> int:
        return min(self.put, self.room)

    def add(self, new: Tensor, old: Tensor, label: Tensor) -> None:
        """Samples in place of the oldest."""
        if self.new is None or self.old is None or self.label is None:
            self.new, self.old = (new.new_zeros(self.room, new.shape[1]) for _ in "no")
            self.label = label.new_zeros(self.room)
        n = min(len(new), self.room)
        at = (self.put + torch.arange(n, device=new.device)) % self.room
        for held, values in ((self.new, new), (self.old, old), (self.label, label)):
            held[at] = values[len(values) - n:]
        self.put += n

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """(new, old, class) of what is held."""
        n = len(self)
        assert self.new is not None and self.old is not None and self.label is not None
        return self.new[:n], self.old[:n], self.label[:n]

    def copy(self) -> Pairs:
        """One that may be added to."""
        other = Pairs(self.room)
        other.load({k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        return other

    def load(self, state: dict[str, object]) -> None:
        """What :func:`vars` said."""
        vars(self).update(state)
