"""Small pipelines of diffusers, drawn at random, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PIXELS, CLASSES, DIT = "pixels", "classes", "dit"
SIDE, STEPS = 16, 20


def pipeline(kind: str, tells: str = "epsilon", seed: int = 0) -> Any:
    """PIXELS: a U-Net that knows no classes; CLASSES: one that knows three; DIT: a transformer of
    three classes, over latents. tells: the scheduler's prediction type."""
    import diffusers as d
    import torch

    torch.manual_seed(seed)
    scheduler = d.DDPMScheduler(num_train_timesteps=STEPS, prediction_type=tells,
                                beta_start=0.005, beta_end=0.3)
    if kind == DIT:
        return d.DiTPipeline(d.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=3, norm_num_groups=1),
            coder(), scheduler, id2label={0: "box", 1: "cross", 2: "disc"})
    return d.DDPMPipeline(d.UNet2DModel(
        sample_size=SIDE, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3 if kind == CLASSES else None), scheduler)


def coder() -> Any:
    """An autoencoder that halves the sides of pictures."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def shapes(folder: Path, each: int = 8, seed: int = 0) -> Path:
    """Pictures of a box, a cross or a disc, in a folder for each."""
    import numpy as np
    from PIL import Image

    g = np.random.default_rng(seed)
    for i in range(3 * each):
        shape = ("box", "cross", "disc")[i % 3]
        (folder / shape).mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[:SIDE, :SIDE] - g.uniform(6, 9, 2)[:, None, None]
        r = g.uniform(4, 6)
        inside = {"disc": np.hypot(y, x) < r, "box": np.maximum(abs(y), abs(x)) < 0.85 * r,
                  "cross": (np.minimum(abs(x), abs(y)) < 1.5) & (np.hypot(y, x) < 1.2 * r)}[shape]
        picture = np.full((SIDE, SIDE, 3), 40, np.uint8)
        picture[inside] = 220
        Image.fromarray(picture).save(folder / shape / f"{i}.png")
    return folder
