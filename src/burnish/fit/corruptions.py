"""Pictures made worse, in nine ways at five severities, each the same on every machine.

Sizes are shares of the shorter side, so that a scan of 8 x 8 and a photograph suffer alike. A row's
draw is the same at all severities: a higher one is more of the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..core.errors import ConfigError, nearest

Array = np.ndarray
Corruption = Callable[[Array, float, np.random.Generator], Array]


def _noise(x: Array, std: float, draw: np.random.Generator) -> Array:
    """Gaussian."""
    return x + std * draw.standard_normal(x.shape)


def _impulse(x: Array, share: float, draw: np.random.Generator) -> Array:
    """Points that are black or white."""
    u = draw.random(x.shape[:2])[..., None]
    return np.where(u < share, draw.integers(0, 2, x.shape[:2])[..., None].astype(x.dtype), x)


def _blur(x: Array, size: float, draw: np.random.Generator) -> Array:
    """By a Gaussian of this deviation."""
    sigma = size * min(x.shape[:2])
    reach = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (0, 1):
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(x.ndim)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, pad, mode="edge"),
                                                           len(kernel), axis)
        x = windows @ (kernel / kernel.sum())
    return x


def _contrast(x: Array, lost: float, draw: np.random.Generator) -> Array:
    return x.mean() + (1 - lost) * (x - x.mean())


def _brightness(x: Array, more: float, draw: np.random.Generator) -> Array:
    return x + more


def _fog(x: Array, share: float, draw: np.random.Generator) -> Array:
    """A slow random field over the picture."""
    return (1 - share) * x + share * _resized(draw.random((3, 3)), x.shape[:2])[..., None]


def _stripes(x: Array, share: float, draw: np.random.Generator) -> Array:
    """Rows that are grey."""
    rows = draw.permutation(x.shape[0])[:round(share * x.shape[0])]
    out = x.copy()
    out[rows] = 0.5
    return out


def _erase(x: Array, side: float, draw: np.random.Generator) -> Array:
    """A grey square."""
    out, edge = x.copy(), max(1, round(side * min(x.shape[:2])))
    top, left = (int(u * (n - edge + 1)) for u, n in zip(draw.random(2), x.shape[:2], strict=True))
    out[top : top + edge, left : left + edge] = 0.5
    return out


def _pixelate(x: Array, lost: float, draw: np.random.Generator) -> Array:
    """Fewer points, each the mean of what it covers."""
    from PIL import Image

    whole = x.shape[1], x.shape[0]
    small = [max(1, round((1 - lost) * n)) for n in whole]
    each = [Image.fromarray(x[..., c].astype(np.float32)) for c in range(x.shape[2])]
    return np.stack([np.asarray(e.resize(small, Image.Resampling.BOX).resize(
        whole, Image.Resampling.NEAREST), dtype=x.dtype) for e in each], -1)


#: name -> (what is done, how much of it at severities 1 to 5)
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (_noise, (0.08, 0.15, 0.22, 0.3, 0.4)),
    "impulse": (_impulse, (0.03, 0.06, 0.11, 0.18, 0.27)),
    "blur": (_blur, (0.04, 0.06, 0.08, 0.1, 0.13)),
    "contrast": (_contrast, (0.3, 0.5, 0.65, 0.78, 0.88)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "fog": (_fog, (0.2, 0.35, 0.5, 0.62, 0.72)),
    "stripes": (_stripes, (0.13, 0.25, 0.38, 0.5, 0.63)),
    "erase": (_erase, (0.15, 0.25, 0.38, 0.5, 0.6)),
    "pixelate": (_pixelate, (0.2, 0.35, 0.5, 0.6, 0.7)),
}
SEVERITIES = (1, 2, 3, 4, 5)


def corrupted(image: Any, name: str, severity: int, row: int = 0, seed: int = 0) -> Any:
    """A picture of PIL made worse, in its own size; grey stays grey, other modes become RGB."""
    from PIL import Image

    check(name, severity)
    image = image if image.mode == "L" else image.convert("RGB")
    x = np.asarray(image, dtype=np.float64).reshape(image.height, image.width, -1) / 255
    act, amounts = CORRUPTIONS[name]
    draw = np.random.default_rng([seed, zlib.crc32(name.encode()), row])
    made = np.clip(act(x, amounts[severity - 1], draw), 0, 1)
    pixels = np.uint8(np.round(255 * made))
    return Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels)


def check(name: str, severity: int) -> None:
    """ConfigError for what is no corruption, or no severity of one."""
    if name not in CORRUPTIONS:
        raise ConfigError(f"unknown corruption {name!r}; expected one of {', '.join(CORRUPTIONS)}"
                          f"{nearest(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity}: expected 1 to 5")


class Corrupted:
    """Rows with pictures that are made worse as they are asked for."""

    def __init__(self, rows: Any, name: str, severity: int, seed: int = 0):
        check(name, severity)
        self.rows, self.how = rows, (name, severity)
        self.seed, self.column_names = seed, rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int | str) -> Any:
        if isinstance(at, str):
            if at == "image":
                raise KeyError("pictures are made worse one by one: ask for a row")
            return self.rows[at]
        row = dict(self.rows[at])
        return row | {"image": corrupted(row["image"], *self.how, row=at, seed=self.seed)}


def _resized(field: Array, shape: Sequence[int]) -> Array:
    """Bilinear, corners on corners."""
    for axis, n in enumerate(shape):
        at = np.linspace(0, field.shape[axis] - 1, n)
        low = np.minimum(at.astype(int), field.shape[axis] - 2)
        part = np.expand_dims(at - low, 1 - axis)
        field = (1 - part) * field.take(low, axis) + part * field.take(low + 1, axis)
    return field
