"""A small model that tells what every pixel is, drawn at random, and pictures with masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def segformer(seed: int = 0, side: int = 32, reduce: bool = False, **config: Any
              ) -> tuple[Any, Any]:
    """(SegFormer of two stages, its image processor)."""
    import torch
    import transformers as t

    torch.manual_seed(seed)
    small = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1],
             "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [2, 2],
             "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32,
             "num_labels": 3}
    model = t.SegformerForSemanticSegmentation(t.SegformerConfig(**(small | config)))
    return model, t.SegformerImageProcessorPil(size={"height": side, "width": side},
                                               do_reduce_labels=reduce)


def shapes(folder: Path, each: int = 40, seed: int = 0, side: int = 40,
           first: int = 0, splits: tuple[str, ...] = ("",)) -> Path:
    """``images/`` and ``masks/``: a disc and a box, 1 and 2 in the mask, on 0, in noise; a rim of
    255 about each, which is not counted. first: is added to the numbers."""
    import numpy as np
    from PIL import Image

    g = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    for split in splits:
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(each):
            mask = np.full((side, side), first, np.uint8)
            picture = np.full((side, side, 3), 90.0)
            for number, colour in ((1, (200, 60, 60)), (2, (60, 90, 210))):
                cy, cx = g.uniform(8, side - 8, 2)
                far = np.hypot(y - cy, x - cx) if number == 1 else np.maximum(abs(y - cy),
                                                                              abs(x - cx))
                size = g.uniform(5, 9)
                mask[far < size + 1] = 255
                mask[far < size] = number + first
                picture[far < size] = colour
            picture = np.clip(picture + 12 * g.standard_normal(picture.shape), 0, 255)
            Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(folder / "masks" / split / f"{i}.png")
    return folder
