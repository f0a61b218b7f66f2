"""A small transformer that reads clouds of points, and clouds sampled of surfaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..blocks.state.clouds import between, spread
from ..core.draw import drawn
from .plain import CLASSES, Block, Plain


class Groups(nn.Module):
    """(B, P, 3) -> (neighbourhoods (B, G, k, 3) less their centres, centres (B, G, 3)): each centre
    is the point farthest from those before it, the first the one farthest from the mean."""

    def __init__(self, groups: int, neighbours: int):
        super().__init__()
        self.groups, self.neighbours = groups, neighbours

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sample = torch.arange(len(x), device=x.device).unsqueeze(1)
        centres = x[sample, spread(x, self.groups)]
        near = between(centres, x).topk(self.neighbours, largest=False).indices
        return x[sample.unsqueeze(1), near] - centres.unsqueeze(2), centres


class Tokens(nn.Module):
    """A small PointNet: what is largest of a neighbourhood's points, seen beside each of them."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.first = nn.Sequential(nn.Linear(3, half), nn.GELU(), nn.Linear(half, half))
        self.second = nn.Sequential(nn.Linear(2 * half, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, near: Tensor) -> Tensor:
        f = self.first(near)
        most = f.amax(2, keepdim=True).expand_as(f)
        return self.second(torch.cat([most, f], -1)).amax(2)


class PointTransformer(Plain):
    """A transformer over groups of points, its parts named as in Point-MAE. The head reads the
    class token beside the largest of the others."""

    shape = (32, 3)

    def __init__(self, dropout: float = 0.0, *, width: int = 32, blocks: int = 2, heads: int = 4,
                 groups: int = 8, neighbours: int = 6, classes: int = CLASSES):
        super().__init__()
        self.group_divider = Groups(groups, neighbours)
        self.encoder = Tokens(width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.cls_pos = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(2 * width, classes)

    def logits(self, x: Tensor) -> Tensor:
        near, centres = (t.to(self.cls_token.dtype) for t in self.group_divider(x))
        own = self.encoder(near) + self.pos_embed(centres)
        first = (self.cls_token + self.cls_pos).expand(len(own), -1, -1)
        h = self.norm(self.blocks(torch.cat([first, own], 1)))
        return self.head(torch.cat([h[:, 0], h[:, 1:].amax(1)], -1))

    def example(self, samples: int) -> dict[str, Tensor]:
        """A seeded batch, of numbers that bf16 holds: which points are near is the same there."""
        batch = super().example(samples)
        return batch | {"x": (batch["x"] / 2).bfloat16().float()}


# -- surfaces ---------------------------------------------------------------------------------
def _ball(u: Tensor, v: Tensor) -> Tensor:
    z = 2 * v - 1
    r = (1 - z * z).clamp(min=0).sqrt()
    return torch.stack([r * torch.cos(math.tau * u), r * torch.sin(math.tau * u), z], -1)


def _round(radius: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A surface of revolution: `radius` at each height from -1 to 1."""
    def made(u: Tensor, v: Tensor) -> Tensor:
        z = 2 * v - 1
        r = radius(z)
        return torch.stack([r * torch.cos(math.tau * u), r * torch.sin(math.tau * u), z], -1)
    return made


def _torus(u: Tensor, v: Tensor) -> Tensor:
    a, b = math.tau * u, math.tau * v
    r = 0.7 + 0.3 * torch.cos(b)
    return torch.stack([r * torch.cos(a), r * torch.sin(a), 0.3 * torch.sin(b)], -1)


def _helix(u: Tensor, v: Tensor) -> Tensor:
    a, b = 2 * math.tau * u, math.tau * v
    r = 0.7 + 0.15 * torch.cos(b)
    return torch.stack([r * torch.cos(a), r * torch.sin(a), 2 * u - 1 + 0.15 * torch.sin(b)], -1)


def _saddle(u: Tensor, v: Tensor) -> Tensor:
    x, y = 2 * u - 1, 2 * v - 1
    return torch.stack([x, y, x * x - y * y], -1)


#: name -> (B, P, 3) of two (B, P) numbers from 0 to 1
SURFACES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sphere": _ball, "torus": _torus, "helix": _helix, "saddle": _saddle,
    "cone": _round(lambda z: (1 - z) / 2), "cylinder": _round(lambda z: 0.5 + 0 * z),
    "box": lambda u, v: (p := _ball(u, v)) / p.abs().amax(-1, keepdim=True),
    "octahedron": lambda u, v: (p := _ball(u, v)) / p.abs().sum(-1, keepdim=True),
    "hourglass": _round(lambda z: 0.1 + z.abs() * 0.9), "barrel": _round(lambda z: 1 - z * z / 2),
    "spindle": _round(lambda z: (1 - z * z) / 2), "bowl": lambda u, v: _ball(u, v / 2),
}


def surfaces(kinds: Sequence[str], each: int, points: int = 128, seed: int = 0,
             noise: float = 0.03) -> tuple[Tensor, Tensor]:
    """(clouds (N, points, 3), labels (N,)): so many of each kind, stretched along their axes,
    turned at random, with noise, centred and within the unit ball."""
    with drawn(seed):
        clouds = torch.cat([SURFACES[k](*torch.rand(2, each, points)) for k in kinds])
        stretch = 0.7 + 0.6 * torch.rand(len(clouds), 1, 3)
        turn = torch.linalg.qr(torch.randn(len(clouds), 3, 3)).Q
        clouds = (clouds * stretch) @ turn + noise * torch.randn_like(clouds)
        clouds = clouds - clouds.mean(1, keepdim=True)
        clouds = clouds / clouds.norm(dim=-1).amax(1).view(-1, 1, 1)
        order = torch.randperm(len(clouds))
    return clouds[order], torch.arange(len(kinds)).repeat_interleave(each)[order]
