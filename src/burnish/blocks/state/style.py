"""What noisy pictures of one style have in common, and what of it an answer implies.

    x_t = p x + q e       p = sqrt(a), q = sqrt(1 - a);   of a flow p = a, q = 1 - a

a (B,) in [0, 1] is how much of the picture x (C, H, W) is left at a sample's step, e the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...core.batches import tensors
from ...core.errors import ConfigError


def parts(a: Tensor, tells: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q), each (B, 1, 1, 1)."""
    a = a.view(-1, *[1] * (like.dim() - 1))
    return (a, 1 - a) if tells == "flow" else (a.sqrt(), (1 - a).sqrt())


def clean(x_t: Tensor, told: Tensor, a: Tensor, tells: str) -> Tensor:
    """The clean latents (B, C, H, W) that an answer implies: of the noise ``(x_t - q e) / p``, the
    velocity ``p x_t - q v``, the picture itself, a flow's velocity ``x_t - q v``. In fp32 at least;
    where next to nothing of the picture is left p is held above 1e-3."""
    wide = torch.promote_types(told.dtype, torch.float32)
    x_t, told, a = x_t.to(wide), told.to(wide), a.to(wide)
    p, q = parts(a, tells, x_t)
    if tells == "epsilon":
        return (x_t - q * told) / p.clamp_min(1e-3)
    if tells == "v_prediction":
        return p * x_t - q * told
    return x_t - q * told if tells == "flow" else told


def alike(mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """``cos(B A, B' A')`` of two updates given as (A, B), through rank x rank products; 0 where one
    is nothing."""
    def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> Tensor:
        (A, B), (C, D) = one, two
        return ((B.mT @ D) * (A @ C.mT)).sum()

    wide = torch.promote_types(mine[0].dtype, torch.float32)
    mine, other = ((A.to(wide), B.to(wide)) for A, B in (mine, other))
    sizes = [(inner(u, u) + 1e-24).sqrt() for u in (mine, other)]
    return inner(mine, other) / (sizes[0] * sizes[1])


def nothing(out: Any) -> Tensor:
    """0, with a graph to the first of a model's outputs that has one."""
    held = vars(out) if hasattr(out, "__dict__") and not isinstance(out, Tensor | dict) else out
    found = [t for t in pytree.tree_leaves(held) if isinstance(t, Tensor) and t.is_floating_point()]
    first = next((t for t in found if t.requires_grad), found[0])
    return 0 * first.sum()


def sample_of(out: Any) -> Tensor:
    """What a denoiser answers, among its outputs. Raises ConfigError where it is not one's."""
    found = out if isinstance(out, Tensor) else out.get("sample") if isinstance(out, Mapping) \
        else out[0] if isinstance(out, tuple) and out else getattr(out, "sample", None)
    if not isinstance(found, Tensor) or found.dim() < 3:
        raise ConfigError("museum_maker was given `signal`, so it reads the answer of a denoiser "
                          "(samples, channels, height, width), and this model gives none")
    return found


def noisy(batch: Any, out: Tensor) -> Tensor:
    """The noisy latents among what a denoiser was called with: the first that have the sides of
    what it answers. Raises ConfigError where there are none."""
    for t in tensors(batch):
        if t.is_floating_point() and t.dim() == out.dim() and t.dim() > 2 \
                and (t.shape[0], *t.shape[2:]) == (out.shape[0], *out.shape[2:]) \
                and t.shape[1] <= out.shape[1]:
            return t
    raise ConfigError("museum_maker was given `signal`, so it reads noisy latents (samples, "
                      f"channels, height, width) of the sides of the answer, {list(out.shape)}, "
                      "and the batch has none")


class Mean:
    """``m = sum_b p_b x_t,b / sum_b p_b^2``, the least-squares mean of what was noised: a handler
    of an optimizer's life, so that each stretch of a run has a mean of its own."""

    def __init__(self) -> None:
        self.above: Tensor | None = None
        self.below: Tensor | None = None

    @torch.no_grad()
    def with_these(self, x_t: Tensor, a: Tensor, tells: str, still: bool) -> Tensor:
        """m (C, H, W) of all samples so far, these among them; they count from now on, unless
        the pass is one that leaves no trace."""
        wide = torch.promote_types(x_t.dtype, torch.float32)
        p, _ = parts(a.to(wide), tells, x_t)
        above, below = (p * x_t).sum(0), p.square().sum()
        if self.above is not None and self.below is not None:
            above, below = self.above + above, self.below + below
        if not still:
            self.above, self.below = above, below
        return above / below.clamp_min(1e-6)

    def state_dict(self) -> Mapping[str, Any]:
        return {"above": self.above, "below": self.below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.above, self.below = state["above"], state["below"]
