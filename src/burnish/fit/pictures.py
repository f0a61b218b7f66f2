"""How a picture becomes the tensor a model was trained on.

Only resizing, scaling and normalising, as `preprocessor_config.json` (or timm's own settings)
say: the same at training and at use, and the same on every machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.errors import ConfigError
from ..core.reading import reading, shown
from ..formats import safe
from .repository import file_of


@dataclass(frozen=True)
class Picture:
    """``(x * scale - mean) / std`` of a picture resized to (height, width): (C, H, W) fp32.

    crop: share of the shorter side kept after resizing it to ``size / crop``; 1 squeezes the
        whole picture into the size.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 2
    scale: float = 1 / 255
    crop: float | None = None

    def __call__(self, image: Any) -> torch.Tensor:
        image = self.placed(image.convert("L" if len(self.mean) == 1 else "RGB"), self.resample)
        x = np.asarray(image, dtype=np.float32).reshape(self.height, self.width, -1)
        x = (x * np.float32(self.scale) - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32))

    def placed(self, image: Any, resample: int) -> Any:
        """(height, width) of a picture, or of a mask of it."""
        if self.crop is None:
            return image.resize((self.width, self.height), resample)
        short = min(image.size)
        goal = min(self.height, self.width) / self.crop
        size = (max(self.width, round(image.width * goal / short)),
                max(self.height, round(image.height * goal / short)))
        image = image.resize(size, resample)
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `preprocessor_config.json`, which transformers reads too."""
        config = {"image_processor_type": "ViTImageProcessor", "do_resize": True,
                  "size": {"height": self.height, "width": self.width},
                  "resample": self.resample, "do_rescale": True, "rescale_factor": self.scale,
                  "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std)}
        if self.crop is not None:
            side = round(min(self.height, self.width) / self.crop)
            config |= {"size": {"shortest_edge": side}, "do_center_crop": True,
                       "crop_size": {"height": self.height, "width": self.width}}
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        safe.write_text(Path(folder, "preprocessor_config.json"), text)


def processor_of(model: str | nn.Module, trust_remote_code: bool = False) -> Picture:
    """From the model's own files, timm's settings, or what the config says of its input."""
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if name:
        config = _config(name)
        if config is not None:
            where = f"{name}: preprocessor_config.json"
            with reading(where, ConfigError, "pass processor=burnish.fit.pictures.Picture(...)"):
                return _sane(_from_config(config), where)
    if isinstance(model, str):
        raise ConfigError(f"{model} has no preprocessor_config.json; give processor= with "
                          "a folder that has one (or, in Python, a burnish.fit.pictures.Picture)")
    timm = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if timm:
        _, height, width = timm["input_size"]
        modes = {"bilinear": 2, "bicubic": 3, "nearest": 0, "lanczos": 1}
        return Picture(height, width, tuple(timm["mean"]), tuple(timm["std"]),
                       modes.get(timm.get("interpolation"), 2), crop=timm.get("crop_pct"))
    side = getattr(getattr(model, "config", None), "image_size", None)
    if side is None:
        raise ConfigError(f"cannot tell the picture size of {type(model).__name__}; pass "
                          "processor=burnish.fit.pictures.Picture(height, width, mean, std)")
    height, width = (side, side) if isinstance(side, int) else side
    channels = getattr(model.config, "num_channels", 3)
    return Picture(height, width, (0.5,) * channels, (0.5,) * channels)


def picture_of(config: dict[str, Any]) -> Picture:
    """From what an image processor of transformers says of itself."""
    return _sane(_from_config(config), "the image processor")


def _config(name: str) -> dict[str, Any] | None:
    file = file_of(name, "preprocessor_config.json")
    return None if file is None else safe.read_json(file, finite=True)


def _from_config(config: dict[str, Any]) -> Picture:
    size, crop_size = config.get("size", 224), config.get("crop_size")
    crop = None
    if isinstance(size, dict) and "shortest_edge" in size:
        edge = size["shortest_edge"]
        if config.get("do_center_crop", crop_size is not None) and crop_size:
            size = crop_size
            crop = _pair(size)[0] / edge
        else:
            pct = config.get("crop_pct")
            crop, size = pct or 1.0, edge
    elif config.get("do_center_crop") and crop_size:
        crop, size = _pair(crop_size)[0] / _pair(size)[0], crop_size
    height, width = _pair(size)
    mean = config.get("image_mean") or [0.5] * 3
    std = config.get("image_std") or [0.5] * 3
    if not config.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    scale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    return Picture(height, width, tuple(mean), tuple(std), config.get("resample", 2), scale, crop)


def _sane(picture: Picture, where: str) -> Picture:
    """Refuses sizes and scales no picture has."""
    sides = (picture.height, picture.width)
    if not all(type(s) is int and 1 <= s <= 8192 for s in sides):
        raise ConfigError(f"{where}: size {shown(sides, 60)}; expected whole numbers from 1 "
                          "to 8192")
    numbers = [*picture.mean, *picture.std, picture.scale, *([picture.crop] if picture.crop is not
                                                             None else [])]
    if not all(isinstance(x, int | float) and abs(x) < 1e6 for x in numbers) or \
            not all(s > 0 for s in picture.std) or \
            not (picture.crop is None or picture.crop > 0.01):
        raise ConfigError(f"{where}: means, deviations, scale and crop should be numbers of "
                          "moderate size, deviations and crop above 0")
    if len(picture.mean) != len(picture.std) or len(picture.mean) not in (1, 3):
        raise ConfigError(f"{where}: {len(picture.mean)} means and {len(picture.std)} deviations; "
                          "expected one or three of each")
    if picture.resample not in range(6) or type(picture.resample) is not int:
        raise ConfigError(f"{where}: resample {shown(picture.resample, 40)}; expected a "
                          "number from 0 to 5")
    return picture


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])
