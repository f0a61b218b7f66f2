"""Gradients as short vectors that keep their angles, and the direction Adam would take.

    f = R g / sqrt(k),   R (k, P) of +1 and -1, drawn in strips from a seed and never held whole

    cos(f_a, f_b) is cos(g_a, g_b) to about 1 / sqrt(k).

Letters: n samples, P numbers of a gradient, k numbers that stand for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: columns of R that exist at once
STRIP = 4096


def signs(rows: int, seed: int, number: int, device: torch.device | str = "cpu") -> Tensor:
    """(rows, STRIP) of +1 and -1, the same on every device: strip `number` of the matrix of a seed.
    """
    draw = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    bits = torch.randint(0, 256, (rows, STRIP // 8), generator=draw, dtype=torch.uint8).to(device)
    shift = torch.arange(8, dtype=torch.uint8, device=device)
    ones = (bits.unsqueeze(-1) >> shift) & 1
    return ones.flatten(1).float().mul_(2).sub_(1)


def projected(grads: Mapping[str, Tensor], size: int, seed: int) -> Tensor:
    """(n, size) in fp32: of gradients (n, ...) by name, in the order of their names."""
    names = sorted(grads)
    first = grads[names[0]]
    out = first.new_zeros(len(first), size, dtype=torch.float32)
    number = 0
    for name in names:
        flat = grads[name].flatten(1)
        for start in range(0, flat.shape[1], STRIP):
            part = flat[:, start:start + STRIP].float()
            out += part @ signs(size, seed, number, part.device)[:, :part.shape[1]].t()
            number += 1
    return out / size**0.5


def adam_direction(g: Tensor, m: Tensor, v: Tensor, step: int, betas: tuple[float, float],
                   eps: float) -> Tensor:
    """Where Adam would go with gradients g (n, ...), its moments being m and v (...) after `step`
    updates: ``m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps)``, t = step + 1."""
    b1, b2 = betas
    first = (1 - b1) * g + b1 * m
    second = (1 - b2) * g.square() + b2 * v
    return first / (1 - b1**(step + 1)) / ((second / (1 - b2**(step + 1))).sqrt() + eps)
