"""Two views of each sample, and how far what is made of them is from being one and uncorrelated.

    C_ij = mean_b a_bi b_bj        a, b (B, D): embeddings of the views, each number at mean 0 and
                                   deviation 1 over the batch
    sum_i (1 - C_ii)^2 + redundancy sum_i sum_{j != i} C_ij^2

The first sum is 0 where an embedding does not see the distortion, the second where its numbers say
different things (Barlow Twins: Zbontar et al., 2021).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.draw import drawn
from ...core.errors import ConfigError


def correlation(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """C (D, D) of two (B, D), in fp32 at least; `eps` is added to each variance."""
    if a.shape != b.shape or a.dim() != 2 or len(a) < 2:
        raise ConfigError("a cross-correlation is of two views of at least two samples, one row of "
                          f"numbers each; got {tuple(a.shape)} and {tuple(b.shape)}")

    def standard(z: Tensor) -> Tensor:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = z - z.mean(0)
        return z / (z.square().mean(0) + eps).sqrt()

    return standard(a).t() @ standard(b) / len(a)


def barlow(a: Tensor, b: Tensor, redundancy: float, eps: float) -> Tensor:
    """The two sums of this file's head, weighed."""
    C = correlation(a, b, eps)
    own = torch.eye(len(C), dtype=torch.bool, device=C.device)
    return (1 - C.diagonal()).square().sum() + \
        redundancy * C.masked_fill(own, 0.0).square().sum()


# -- views --------------------------------------------------------------------------------------
def picture(x: Tensor, strength: float) -> Tensor:
    """x (B, C, H, W): a part of each picture of 1 - strength of its area at least, as large as the
    whole one, with another contrast and brightness (a factor and a shift by up to `strength` of
    its deviation). Never mirrored: signs that are read have no mirror image."""
    n, wide = len(x), x.to(torch.promote_types(x.dtype, torch.float32))
    area, right, down, more, lighter = torch.rand(5, n, dtype=wide.dtype, device=x.device)
    side = (1 - strength * area).sqrt()
    room, none = 1 - side, torch.zeros_like(side)
    theta = torch.stack([torch.stack([side, none, room * (2 * right - 1)], -1),
                         torch.stack([none, side, room * (2 * down - 1)], -1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    cut = F.grid_sample(wide, grid, padding_mode="border", align_corners=False)
    size = wide.flatten(1).std(1, correction=0)

    def each(v: Tensor) -> Tensor:
        return v.view(n, 1, 1, 1)

    return (cut * each(1 + strength * (2 * more - 1))
            + each(strength * size * (2 * lighter - 1))).to(x.dtype)


def numbers(x: Tensor, strength: float) -> Tensor:
    """x (B, ...): each number is, with probability `strength`, that of any sample of the batch in
    its place (SCARF: Bahri et al., 2021)."""
    other = torch.randint(len(x), x.shape, device=x.device)
    return torch.where(torch.rand(x.shape, device=x.device) < strength, x.gather(0, other), x)


def words(mask: Tensor, strength: float, seed: int) -> Tensor:
    """mask (B, T) of the tokens that count: each is left out with probability `strength`, but for
    the first that counts, which may stand for the whole. Drawn on the host, so that a simulation
    knows it too: models branch on whether all tokens count."""
    draw = random.Random(seed)
    left = torch.tensor([[draw.random() < strength for _ in range(mask.shape[1])]
                         for _ in range(len(mask))], device=mask.device)
    first = mask.cumsum(1) == 1
    return torch.where(left & ~first, torch.zeros_like(mask), mask)


def view(args: tuple[Any, ...], kw: Mapping[str, Any], strength: float, masked: bool, seed: int
         ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, distorted as `seed` says: pictures (B, C, H, W) are cut, other
    real numbers mixed, of tokens (B, T) some do not count. masked: the model takes an
    ``attention_mask``.
    ConfigError where nothing of it can be distorted."""
    changed = False

    def real(v: Any) -> bool:
        return isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1

    def other(v: Any) -> Any:
        nonlocal changed
        if not real(v):
            return v
        changed = True
        return picture(v, strength) if v.dim() == 4 else numbers(v, strength)

    with drawn(seed):
        made = {k: v if k == "labels" or "mask" in k else other(v) for k, v in kw.items()}
        out = tuple(other(v) for v in args)
    ids = kw.get("input_ids")
    if masked and isinstance(ids, Tensor) and ids.dim() == 2:
        mask = kw.get("attention_mask")
        made["attention_mask"] = words(torch.ones_like(ids) if mask is None else mask, strength,
                                       seed)
        changed = True
    if not changed:
        raise ConfigError("there is nothing to make another view of: pictures, rows of numbers, "
                          "or input_ids of a model that takes an attention_mask are expected, got "
                          f"{', '.join(kw) or 'positional arguments that are none of them'}")
    return out, made
