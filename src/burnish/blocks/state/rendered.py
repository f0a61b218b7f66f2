"""A cloud of points drawn as a picture, with features that train.

    f_i = W_3 max_{j near i} leaky(GN(W_2 [g_j - g_i; g_i])) + b_3,   g = W_1 p + b_1
    F[:, u, v] = sum of f_i over the points whose 3 x 3 cells hold (u, v)
    x' = normalise(sigmoid(W_5 relu(W_4 (F + K_2 relu(K_1 F)))))

p seen along z: a cell is the larger of the ranges of x and y over S - 3, and what is drawn stands
in the middle. Which cells a point falls into has no gradient.

Letters: B clouds, P points, C channels, S side of what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..tape.cast import uncast
from .coordinator import picture_of
from .instance import nearest
from .prompts import Listener, accepts

FIRST, WIDE, _GROUPS, _LEAK = 8, 64, 4, 0.2


class Painter(nn.Module):
    """(B, P, 3) -> features (B, P, 64), and a map of them -> pixels (B, 3, S, S) from 0 to 1."""

    def __init__(self, neighbours: int):
        super().__init__()
        self.k = neighbours
        self.first = nn.Linear(3, FIRST)
        self.edges = nn.Linear(2 * FIRST, WIDE, bias=False)
        self.norm = nn.GroupNorm(_GROUPS, WIDE)
        self.last = nn.Linear(WIDE, WIDE)
        self.inner = nn.Conv2d(WIDE, WIDE, 3, padding=1)
        self.outer = nn.Conv2d(WIDE, WIDE, 3, padding=1)
        self.mix = nn.Conv2d(WIDE, WIDE, 1)
        self.colour = nn.Conv2d(WIDE, 3, 1)

    def features(self, p: Tensor) -> Tensor:
        g = self.first(p)
        of_edge, of_own = self.edges.weight.chunk(2, 1)
        there, here = F.linear(g, of_edge), F.linear(g, of_own - of_edge)
        sample = torch.arange(len(p), device=p.device).view(-1, 1, 1)
        made = there[sample, nearest(p, self.k)] + here.unsqueeze(2)
        made = self.norm(made.permute(0, 3, 1, 2)).amax(3).mT          # rises with what it norms
        return self.last(F.leaky_relu(made, _LEAK))

    def pixels(self, drawn: Tensor) -> Tensor:
        h = drawn + self.outer(F.relu(self.inner(drawn)))
        return torch.sigmoid(self.colour(F.relu(self.mix(h))))


def cells(xy: Tensor, side: int) -> Tensor:
    """(B, P, 2): the first of each point's 3 x 3 cells, from 0 to S - 3; drawn in the middle."""
    xy = xy.to(torch.promote_types(xy.dtype, torch.float32))
    low, high = xy.amin(1, keepdim=True), xy.amax(1, keepdim=True)
    most = (high - low).amax(-1, keepdim=True).clamp_(min=torch.finfo(xy.dtype).tiny)
    at = ((xy - low) / most * (side - 3)).floor().long().clamp_(max=side - 3)
    return at + (side - 3 - at.amax(1, keepdim=True)) // 2


def splat(features: Tensor, at: Tensor, side: int) -> Tensor:
    """(B, C, S, S): the features (B, P, C) of all points on a cell, added."""
    B, P, C = features.shape
    step = torch.arange(3, device=at.device)
    rows, columns = at[..., 1, None, None] + step[:, None], at[..., 0, None, None] + step
    flat = (rows * side + columns).flatten(1)                          # (B, 9 P)
    flat = flat + side * side * torch.arange(B, device=at.device).unsqueeze(1)
    nine = features.unsqueeze(2).expand(-1, -1, 9, -1).reshape(-1, C)
    out = features.new_zeros(B * side * side, C).index_add(0, flat.flatten(), nine)
    return out.view(B, side, side, C).permute(0, 3, 1, 2)


def turned(p: Tensor) -> Tensor:
    """Each cloud about its upright axis y, by an angle of its own."""
    a = math.tau * torch.rand(len(p), 1, device=p.device, dtype=p.dtype)
    x, y, z = p.unbind(-1)
    return torch.stack([x * a.cos() + z * a.sin(), y, z * a.cos() - x * a.sin()], -1)


class Rendered(Listener):
    """Listens to the model: its picture is drawn of the points under `key` in the batch.

    side: S, padded to the picture; None: as large as it. size: of the picture, where the batch
    holds none that says it.
    """

    what = "a picture of points"

    def __init__(self, state: Any, adapter: str, painter: Painter, key: str, *, side: int | None,
                 size: int, rotate: bool, mean: Sequence[float], std: Sequence[float]):
        super().__init__(state, adapter)
        self.painter, self.key, self.side, self.size = painter, key, side, size
        self.rotate, self.mean, self.std = rotate, list(mean), list(std)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        p = torch.as_tensor(self.here.need(self.key), device=self.painter.last.weight.device)
        where, sides, dtype = self.picture(module, args, kw)
        x = self.drawn(p, sides).to(dtype)
        if isinstance(where, int):
            return call(*args[:where], x, *args[where + 1 :], **kw)
        return call(*args, **{**kw, where: x})

    def picture(self, module: nn.Module, args: tuple, kw: dict[str, Any]
                ) -> tuple[int | str, tuple[int, int], torch.dtype]:
        """Which argument is the picture, its sides and its dtype."""
        try:
            where = picture_of(args, kw)
        except RecipeError:                      # the batch holds points alone
            if not accepts(module, "pixel_values") and not accepts(module, "x"):
                raise RecipeError(f"p2p: which argument of {type(module).__name__} is the picture "
                                  "cannot be told; expected pixel_values or x") from None
            dtype = next(t.dtype for t in module.parameters() if t.is_floating_point())
            name = "pixel_values" if accepts(module, "pixel_values") else "x"
            return name, (self.size, self.size), dtype
        x = args[where] if isinstance(where, int) else kw[where]
        return where, (x.shape[2], x.shape[3]), x.dtype

    def drawn(self, p: Tensor, sides: tuple[int, int]) -> Tensor:
        """(B, 3, height, width) of points (B, P, 3)."""
        side = self.side or min(sides)
        if side > min(sides) or side < 4:
            raise RecipeError(f"p2p draws {side} x {side} cells, at least 4 x 4, in a picture of "
                              f"{sides[0]} x {sides[1]}")
        with uncast(p):
            p = p.to(self.painter.last.weight.dtype)
            seen = turned(p) if self.rotate and self.training else p
            drawn = splat(self.painter.features(p), cells(seen[..., :2], side), side)
            up, left = (sides[0] - side) // 2, (sides[1] - side) // 2
            drawn = F.pad(drawn, (left, sides[1] - side - left, up, sides[0] - side - up))
            pixels = self.painter.pixels(drawn)
            mean, std = (pixels.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
            return (pixels - mean) / std
