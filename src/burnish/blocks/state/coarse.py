"""A function of a picture's patches at a lower resolution, spread over them again.

    y = U f(M x)        M (m, N) means over stride x stride patches, U (N, m) bilinear

of the N = gh gw patches x (N, D), m = ceil(gh / stride) ceil(gw / stride); windows at the edges
have the mean of the patches that are there. Both are products with fixed matrices, so what waits
for backward is what f keeps of m tokens; the patches do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from .prompts import Listener

_GRID = "grid of patches"


def means(n: int, stride: int, like: Tensor) -> Tensor:
    """(ceil(n / stride), n): each row a mean over `stride` neighbours, or those that are left."""
    at = torch.arange(n, device=like.device) // stride
    rows = torch.arange(-(-n // stride), device=like.device)
    M = (at == rows[:, None]).to(torch.promote_types(like.dtype, torch.float32))
    return M / M.sum(1, keepdim=True)


def spread(m: int, n: int, like: Tensor) -> Tensor:
    """(n, m): linear interpolation between m centres over n points (corners not aligned)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    eye = torch.eye(m, dtype=wide, device=like.device)
    return F.interpolate(eye[None], n, mode="linear", align_corners=False)[0].t()


class Coarse(nn.Module):
    """``y`` at the patches, and at the tokens before them the mean of f's m: a branch of a block's
    input (B, T, D). A head that reads the class token alone reads the last block's branch so.

    The patches are the last gh gw tokens; which grid they make, :class:`Grid` has noted.
    """

    def __init__(self, f: nn.Module, stride: int):
        super().__init__()
        self.f, self.stride = f, stride

    def forward(self, x: Tensor) -> Tensor:
        if (grid := context().noted.get(_GRID)) is None:
            raise RecipeError("lite_residual: a block runs without the convolution that cuts the "
                              "picture into patches, so their grid is not known: run the whole "
                              "model")
        gh, gw = grid
        if x.dim() != 3 or x.shape[1] < gh * gw:
            raise RecipeError(f"lite_residual reads tokens (batch, tokens, width), the last "
                              f"{gh} x {gw} of them patches; a block is given {tuple(x.shape)}")
        before = x.shape[1] - gh * gw
        M, U = self._fixed(grid, x)
        y = self.f(M @ x[:, before:])
        return torch.cat([y.mean(1, keepdim=True).expand(-1, before, -1), U @ y], 1)

    @torch.no_grad()
    def _fixed(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """M and U, once for all blocks of a forward: backward keeps them."""
        here, key = context().noted, (_GRID, self.stride, like.dtype, like.device)
        if key not in here:
            down = [means(n, self.stride, like) for n in grid]
            up = [spread(len(M), n, like) for M, n in zip(down, grid, strict=True)]
            here[key] = tuple(torch.kron(*pair).to(like.dtype) for pair in (down, up))
        M, U = here[key]
        return M, U


class Grid(Listener):
    """Listens to the convolution that cuts pictures into patches, and notes the grid they make."""

    what = "a branch at a lower resolution"

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        if out.dim() == 4:
            context().noted[_GRID] = tuple(out.shape[-2:])
        return out

    def check(self, call: Any) -> None:
        pass                                     # it changes nothing
