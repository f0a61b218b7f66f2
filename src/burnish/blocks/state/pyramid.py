"""A pyramid of maps beside a vision transformer: it reads the picture, and what the blocks make.

Its stages halve the map and widen it, as a convolutional network does. A block of a stage is told
by one block of the transformer: its tokens come through the stage's bridge, to the map's size.

Letters: B samples, d the transformer's width, c a stage's, H x W its map, gh x gw the patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from .prompts import Listener, Tokens
from .taps import run_elsewhere


def flat(maps: Tensor) -> Tensor:
    """(B, c, H, W) -> (B, H W, c)."""
    return maps.flatten(2).transpose(1, 2)


def kept(x: Tensor, p: float) -> Tensor:
    """The branches of some samples, each gone with probability p, in proportion."""
    return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - p).div_(1 - p)


class Told(nn.Module):
    """``x += A(Norm x; [Norm m; mean v])``, ``x += v``, ``x += MLP(Norm x)``: A attention of the
    map to two tokens, of what the block's own token became (m) and of its patches (v, as many as
    the map's)."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.own, self.norm1, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, m: Tensor, v: Tensor) -> Tensor:
        told = torch.cat([self.own(m), v.mean(1, keepdim=True)], 1)
        x = x + self._kept(self._attend(self.norm1(x), told)) + v
        return x + self._kept(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _attend(self, x: Tensor, told: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in (self.q(x), *self.kv(told).chunk(2, -1)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _kept(self, x: Tensor) -> Tensor:
        return kept(x, self.drop_path) if self.drop_path and self.training else x


class Stage(nn.Module):
    """One size of map: ``Norm(enter(map))``, then a block for each block of the transformer that it
    is told by, then a norm. bridge: d -> c, before the patches are spread over the map, which is
    the same as behind it and c / d of the work."""

    def __init__(self, enter: nn.Module, width: int, small: int, heads: int, blocks: int,
                 drop_path: float = 0.0, affine: bool = True):
        super().__init__()
        self.enter, self.norm = enter, nn.LayerNorm(small)
        self.bridge = nn.Linear(width, small)
        self.blocks = nn.ModuleList(Told(small, heads, drop_path) for _ in range(blocks))
        self.end = nn.LayerNorm(small, elementwise_affine=affine)

    def forward(self, maps: Tensor, taps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        maps = self.enter(maps)
        size = maps.shape[-2:]
        x = self.norm(flat(maps))
        for block, tap in zip(self.blocks, taps, strict=True):
            m, v = self.bridge(tap).split([1, grid[0] * grid[1]], 1)
            v = v.transpose(1, 2).unflatten(-1, grid)
            x = block(x, m, flat(F.interpolate(v, size, mode="bilinear", align_corners=False)))
        return self.end(x).transpose(1, 2).unflatten(-1, size)


def stem(channels: int, small: int) -> nn.Sequential:
    """A picture at a quarter of its height and width."""
    return nn.Sequential(nn.Conv2d(channels, small, 3, 2, 1, bias=False), nn.BatchNorm2d(small),
                         nn.ReLU(), nn.Conv2d(small, small, 2, 2))


class Pyramid(nn.Module):
    """The stages, from the picture to the smallest map. The last norm has no scale and no shift: a
    batch norm behind the mean of its map would take both away again."""

    def __init__(self, channels: int, width: int, widths: Sequence[int], heads: Sequence[int],
                 blocks: int, drop_path: float = 0.0):
        super().__init__()
        before = [None, *widths[:-1]]
        self.stages = nn.ModuleList(
            Stage(nn.Conv2d(a, c, 3, 2, 1) if a else stem(channels, c), width, c, h, blocks,
                  drop_path, affine=k + 1 < len(widths))
            for k, (a, c, h) in enumerate(zip(before, widths, heads, strict=True)))
        self.told = blocks
        self.apply(_start)

    def maps(self, picture: Tensor, taps: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """(B, c, H, W) of every stage. taps: of every block of the transformer its own token, then
        its patches, (B, 1 + gh gw, d)."""
        out, n = [picture], self.told
        for k, stage in enumerate(self.stages):
            out.append(stage(out[-1], taps[k * n : (k + 1) * n], grid))
        return out[1:]

    def forward(self, picture: Tensor, taps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return self.maps(picture, taps, grid)[-1]


def _start(m: nn.Module) -> None:
    if isinstance(m, nn.Linear):
        nn.init.normal_(m.weight, std=0.02)
        nn.init.zeros_(m.bias)
    elif isinstance(m, nn.Conv2d):
        fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
        nn.init.normal_(m.weight, std=(2 / fan_out) ** 0.5)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# -- where it stands ------------------------------------------------------------------------------
class Picture(Listener):
    """Listens to the convolution that cuts pictures into patches: what it is given, and how many
    patches it makes of it, wait for the pyramid."""

    what = "a side network"

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        box = self.here.box
        box["picture", self.adapter] = args[0] if args else next(iter(kw.values())), out.shape[-2:]
        box["taps", self.adapter] = []
        return out


class Own(Tokens):
    """A token of one block's own: put in before it, taken out behind it. What it has become waits
    for the pyramid, with the patches behind it."""

    what = "a side network"

    def __init__(self, state: Any, adapter: str, row: Tensor, after: int):
        super().__init__(state, adapter, 1, row, after=after, enter=True, leave=True)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if run_elsewhere(self):
            raise RecipeError(f"{self.adapter}: {type(module).__name__} runs inside a gradient "
                              "checkpointing, and the states that a side network reads would be cut"
                              " off from their gradient: switch that checkpointing off")
        return super().around(module, call, *args, **kw)

    def take(self, x: Tensor) -> Tensor:
        self.here.box.setdefault(("taps", self.adapter), []).append(x[:, self.after :])
        return super().take(x)


class Answer(Listener):
    """Listens to the linear head, and answers in its place, from the smallest map:
    ``out(BatchNorm(mean over the map))``."""

    what = "a side network"

    def __init__(self, state: Any, adapter: str, pyramid: Pyramid, small: int, classes: int):
        super().__init__(state, adapter)
        self.pyramid, self.out = pyramid, nn.Linear(small, classes)
        self.norm = nn.BatchNorm1d(small, eps=1e-6, affine=False)
        _start(self.out)

    def _apply(self, fn: Callable[..., Any], *args: Any, **kw: Any) -> Answer:
        super()._apply(fn, *args, **kw)
        if self.norm.running_mean.dtype in (torch.float16, torch.bfloat16):
            self.norm.float()                        # small steps would be lost in running sums
        return self

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        box = self.here.box
        if ("picture", self.adapter) not in box:
            raise RecipeError(f"{self.adapter}: the head runs without the model below it, so there "
                              "is no picture for the side network: run the whole model")
        picture, grid = box.pop(("picture", self.adapter))
        taps = box.pop(("taps", self.adapter))
        given = args[0] if args else next(iter(kw.values()))
        if given.dim() != 2 or taps[0].shape[1] != 1 + grid[0] * grid[1]:
            raise RecipeError(f"{self.adapter}: a side network that answers for the whole picture "
                              f"needs a head of (batch, channels), which is given "
                              f"{tuple(given.shape)}, and the patches of a grid of "
                              f"{grid[0]} x {grid[1]} in the blocks, which have "
                              f"{taps[0].shape[1] - 1}")
        if self.training and len(picture) < 2:
            raise RecipeError(f"{self.adapter}: a batch norm stands before the head, and one sample"
                              " has no variance to learn from: train with two or more in a batch")
        wide = self.norm.running_mean.dtype
        y = self.pyramid(picture, taps, tuple(grid)).mean((2, 3), dtype=wide)
        return self.out(self.norm(y).to(given.dtype))
