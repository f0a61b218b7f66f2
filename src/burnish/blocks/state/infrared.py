"""What a second picture of the same scene says, for the tokens of a frozen vision transformer.

A pool of features of both pictures at three scales, and injectors that look into it from the patch
grid by deformable attention. Letters: B batch, T patches, M tokens of the pool, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from .coordinator import picture_of
from .prompts import Listener

#: sides of the kernels, a group of channels each
KERNELS = (3, 3, 5, 7)
LEVELS = 3


class Norm(nn.BatchNorm2d):
    """A batch norm that goes by its running statistics where a channel has one number alone."""

    def forward(self, x: Tensor) -> Tensor:
        alone = self.training and x.numel() == x.shape[1]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            eps=self.eps) if alone else super().forward(x)


def _step(inp: int, out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inp, out, 3, stride, 1, bias=False), Norm(out), nn.ReLU()]


class Mix(nn.Module):
    """``a R + (1 - a) S``, a = sigmoid(W (R + S)), group by group of channels: R and S of a
    convolution each, with the group's kernel; W (1 x 1) is one for all groups."""

    def __init__(self, width: int):
        super().__init__()
        g = width // len(KERNELS)
        self.first, self.second = (nn.ModuleList(nn.Conv2d(g, g, k, padding=k // 2)
                                                 for k in KERNELS) for _ in range(2))
        self.gate = nn.Conv2d(g, g, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        out = []
        for f, s, x, y in zip(self.first, self.second, first.chunk(len(KERNELS), 1),
                              second.chunk(len(KERNELS), 1), strict=True):
            R, S = f(x), s(y)
            a = torch.sigmoid(self.gate(R + S))
            out.append(a * R + (1 - a) * S)
        return torch.cat(out, 1)


class Pool(nn.Module):
    """Both pictures (B, 3, H, W) -> (B, M, D) and the sides of its levels, of H / 8, H / 16 and
    H / 32, rounded up: a stem of three convolutions each, :class:`Mix`, a convolution of stride 2
    per level, 1 x 1 to D, and a vector per level.

    Convolutions start normal, std sqrt(2 / (k^2 out)), shifts 0, the vectors N(0, 1).
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        c = channels
        self.first, self.second = (nn.Sequential(*_step(3, c, 2), *_step(c, c, 1), *_step(c, c, 1),
                                                 nn.MaxPool2d(3, 2, 1)) for _ in range(2))
        self.mix = Mix(c)
        self.down = nn.ModuleList(nn.Sequential(*_step(a, b, 2))
                                  for a, b in ((c, 2 * c), (2 * c, 4 * c), (4 * c, 4 * c)))
        self.out = nn.ModuleList(nn.Conv2d(n, width, 1) for n in (2 * c, 4 * c, 4 * c))
        self.level = nn.Parameter(torch.randn(LEVELS, width))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                n = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                nn.init.normal_(m.weight, std=math.sqrt(2 / n))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        x, tokens, sides = self.mix(self.first(first), self.second(second)), [], []
        for down, out, level in zip(self.down, self.out, self.level, strict=True):
            x = down(x)
            sides.append((x.shape[2], x.shape[3]))
            tokens.append(out(x).flatten(2).mT + level)
        return torch.cat(tokens, 1), sides

    @staticmethod
    def count(width: int, c: int) -> int:
        """Trainable numbers."""
        g = c // len(KERNELS)
        stems = 2 * (27 * c + 18 * c * c + 6 * c)
        mix = 2 * sum(g * g * k * k + g for k in KERNELS) + g * g + g
        downs = 9 * (2 + 8 + 16) * c * c + 2 * (2 + 4 + 4) * c
        return stems + mix + downs + (2 + 4 + 4) * c * width + 6 * width


class Deformable(nn.Module):
    """Attention that looks at a few places of every level of a pool:

        y = W_o concat_h sum_{l, k} a_hlk V_l(p + o_hlk / (w_l, h_l)),   a = softmax over l, k

    V = W_v F, read bilinearly (0 outside); p the query's own place, in 0 to 1; o and a linear in
    the query. Start: o of head h is k + 1 steps in the h-th direction around, a even.
    """

    def __init__(self, width: int, heads: int, places: int):
        super().__init__()
        self.heads, self.places = heads, places
        n = heads * LEVELS * places
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.offsets, self.weights = nn.Linear(width, 2 * n), nn.Linear(width, n)
        for m in (self.value, self.out):
            nn.init.xavier_uniform_(m.weight)
        for m in (self.value, self.out, self.offsets, self.weights):
            nn.init.zeros_(m.bias)
        for m in (self.offsets, self.weights):
            nn.init.zeros_(m.weight)
        turn = torch.arange(heads) * (math.tau / heads)
        way = torch.stack([turn.cos(), turn.sin()], -1)
        way = way / way.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, places + 1).view(1, 1, places, 1)
        with torch.no_grad():
            self.offsets.bias.copy_((way.view(heads, 1, 1, 2) * steps
                                     ).expand(heads, LEVELS, places, 2).flatten())

    def forward(self, q: Tensor, p: Tensor, pool: Tensor, sides: Sequence[tuple[int, int]]
                ) -> Tensor:
        (B, T, _), h = q.shape, self.heads
        V = self.value(pool).unflatten(-1, (h, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # (B h, d, M)
        o = self.offsets(q).view(B, T, h, LEVELS, self.places, 2)
        a = self.weights(q).view(B, T, h, -1).softmax(-1).view(B, T, h, LEVELS, self.places)
        y, done = torch.zeros_like(V[:, :, :1]).expand(-1, -1, T), 0
        for level, (rows, columns) in enumerate(sides):
            at = p.view(1, T, 1, 1, 2) + o[:, :, :, level] / o.new_tensor([columns, rows])
            at = (2 * at - 1).transpose(1, 2).flatten(0, 1)              # (B h, T, places, 2)
            part = V[:, :, done : done + rows * columns].unflatten(-1, (rows, columns))
            seen = F.grid_sample(part, at, align_corners=False)           # (B h, d, T, places)
            y = y + (seen * a[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)
            done += rows * columns
        return self.out(y.view(B, -1, T).mT)


class Injector(nn.Module):
    """``P = (1 - z) P' + z N``, N = gamma * attention of LN x into LN F, z (B, D) = sigmoid(W [mean
    N; mean P']) over the tokens; the first of them has no P' and gives N. gamma starts 0."""

    def __init__(self, width: int, heads: int, places: int, first: bool):
        super().__init__()
        self.norm_q, self.norm_f = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attention = Deformable(width, heads, places)
        self.gamma = nn.Parameter(torch.zeros(width))
        self.gate = None if first else nn.Linear(2 * width, width)

    def z(self, N: Tensor, before: Tensor) -> Tensor:
        """(B, D), how much of what is new is taken."""
        assert self.gate is not None
        return torch.sigmoid(self.gate(torch.cat([N.mean(1), before.mean(1)], -1)))

    def forward(self, x: Tensor, p: Tensor, pool: Tensor, sides: Sequence[tuple[int, int]],
                before: Tensor | None) -> Tensor:
        N: Tensor = self.gamma * self.attention(self.norm_q(x), p, self.norm_f(pool), sides)
        if before is None:
            return N
        z = self.z(N, before).unsqueeze(1)
        return (1 - z) * before + z * N

    @staticmethod
    def count(width: int, heads: int, places: int, first: bool) -> int:
        """Trainable numbers."""
        n, d = heads * LEVELS * places, width
        gate = 0 if first else 2 * d * d + d
        return 2 * (d * d + d) + 3 * n * (d + 1) + 5 * d + gate


# -- in a model -----------------------------------------------------------------------------------
class Pooled(Listener):
    """Listens to the model: the pool of its picture and of the one that the batch names `key`,
    (B, 1 or 3, H, W) of 0 to 1, waits for the injectors of this call.

    mean, std: of the pixels, by channel, for the second picture, which is resized where it is of
    another size. patch: sides of a patch.
    """

    what = "a pool of two pictures"

    def __init__(self, state: Any, adapter: str, pool: Pool, key: str, mean: Sequence[float],
                 std: Sequence[float], patch: tuple[int, int]):
        super().__init__(state, adapter)
        self.pool, self.key, self.patch = pool, key, patch
        self.mean, self.std = list(mean), list(std)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        where = picture_of(args, kw)
        x: Tensor = args[where] if isinstance(where, int) else kw[where]
        w = self.pool.level
        y = torch.as_tensor(context().need(self.key), device=x.device)
        if y.dim() != 4 or len(y) != len(x) or y.shape[1] not in (1, 3) or x.shape[1] != 3:
            raise RecipeError(f"{self.key!r} is (batch, 1 or 3, height, width) beside a picture of "
                              f"three channels; here are {tuple(y.shape)} and {tuple(x.shape)}")
        y = y.to(w).expand(-1, 3, -1, -1)
        if y.shape[-2:] != x.shape[-2:]:
            y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        y = (y - w.new_tensor(self.mean).view(3, 1, 1)) / w.new_tensor(self.std).view(3, 1, 1)
        grid = (x.shape[2] // self.patch[0], x.shape[3] // self.patch[1])
        self.here.box["pool", self.adapter] = (*self.pool(x.to(w), y), grid)
        try:
            return call(*args, **kw)
        finally:
            self.here.box.pop(("pool", self.adapter), None)
            self.here.box.pop(("injected", self.adapter), None)


class Injected(Listener):
    """Listens to the first block of a stage, outside of how it runs: its tokens, behind `after`
    others, are given P beside."""

    what = "a pool of two pictures"
    outside = True

    def __init__(self, state: Any, adapter: str, injector: Injector, after: int):
        super().__init__(state, adapter)
        self.injector, self.after = injector, after

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if args:
            return call(self.put(args[0]), *args[1:], **kw)
        name, x = next(iter(kw.items()))
        return call(**{**kw, name: self.put(x)})

    def put(self, x: Tensor) -> Tensor:
        """The tokens with P: (B, T, D), or a grid (B, h, w, D)."""
        box = self.here.box
        if ("pool", self.adapter) not in box:
            raise RecipeError("an injector reads a pool made where the model begins, and this "
                              "block runs without it (somebody else's checkpointing?); take "
                              "burnish's checkpoint, or run the whole model")
        pool, sides, (rows, columns) = box["pool", self.adapter]
        flat = x.flatten(1, -2)
        if flat.shape[1] != self.after + rows * columns:
            raise RecipeError(f"{rows} x {columns} patches and {self.after} tokens before them are "
                              f"expected, and a block is given {tuple(x.shape[1:-1])}")
        q, w = flat[:, self.after :], self.injector.gamma
        ys, xs = ((torch.arange(n, device=w.device, dtype=w.dtype) + 0.5) / n
                  for n in (rows, columns))
        p = torch.stack([xs.expand(rows, -1), ys.unsqueeze(1).expand(-1, columns)], -1)
        P = self.injector(q.to(w.dtype), p.flatten(0, 1), pool, sides,
                          box.get(("injected", self.adapter)))
        box["injected", self.adapter] = P
        P = F.pad(P.to(x.dtype), (0, 0, self.after, 0))
        return (flat + P).view_as(x)
