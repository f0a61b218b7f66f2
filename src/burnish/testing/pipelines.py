"""Small pipelines of diffusers, drawn at random, and pictures for them."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PIXELS, CLASSES, DIT = "pixels", "classes", "dit"
#: pipelines that read texts, by the families of diffusers
SD, SDXL, SD3 = "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"
PROMPTED = (SD, SDXL, SD3)
SIDE, STEPS, TOKENS = 16, 20, 24


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


def coder(**config: Any) -> Any:
    """An autoencoder that halves the sides of pictures."""
    import diffusers

    said = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4,
            "sample_size": SIDE, "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**(said | config))


def letters(longest: int = TOKENS) -> Any:
    """CLIP's tokenizer with a token for each letter, and none for anything else."""
    return worded((), longest)


def worded(words: Sequence[str], longest: int = TOKENS) -> Any:
    """The same with a token for each of these words."""
    from transformers import CLIPTokenizer

    known = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase),
             "<|startoftext|>", "<|endoftext|>"]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        whole = [*itertools.accumulate(parts)]
        merges += [pair for pair in zip(whole, parts[1:], strict=False) if pair not in merges]
        known += [w for w in whole if w not in known]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(known)}, merges=merges,
                         model_max_length=longest)


def reader(projected: bool = False, longest: int = TOKENS, **config: Any) -> Any:
    """CLIP's text encoder, for :func:`letters`."""
    import transformers as t

    said = {"vocab_size": 54, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": longest, "projection_dim": 20,
            "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    kind = t.CLIPTextModelWithProjection if projected else t.CLIPTextModel
    return kind(t.CLIPTextConfig(**(said | config)))


def prompted(kind: str = SD, tells: str = "epsilon", seed: int = 0) -> Any:
    """A pipeline that draws what a text says: SD and SDXL with a U-Net, SD3 with a transformer and
    a flow, for which `tells` says nothing."""
    import diffusers as d
    import torch

    torch.manual_seed(seed)
    if kind == SD3:
        side = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
        return d.StableDiffusion3Pipeline(
            transformer=d.SD3Transformer2DModel(
                **side, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=40,
                pos_embed_max_size=8),
            scheduler=d.FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=3.0),
            vae=coder(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=reader(True), tokenizer=letters(), text_encoder_2=reader(True),
            tokenizer_2=letters(), text_encoder_3=None, tokenizer_3=None)
    xl = kind == SDXL
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 44} if xl else {}
    unet = d.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(16, 32), attention_head_dim=8, cross_attention_dim=48 if xl else 24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more)
    scheduler = d.DDPMScheduler(num_train_timesteps=STEPS, prediction_type=tells, steps_offset=1,
                                beta_start=0.005, beta_end=0.3, clip_sample=False)
    if xl:
        return d.StableDiffusionXLPipeline(
            vae=coder(), unet=unet, scheduler=scheduler, text_encoder=reader(),
            tokenizer=letters(), text_encoder_2=reader(True), tokenizer_2=letters(),
            add_watermarker=False)
    return d.StableDiffusionPipeline(
        vae=coder(), unet=unet, scheduler=scheduler, text_encoder=reader(), tokenizer=letters(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def described(folder: Path, each: int = 8, seed: int = 0) -> Path:
    """The same pictures as :func:`shapes`, in one folder with a `metadata.jsonl` of captions."""
    lines = []
    for path in sorted(shapes(folder, each, seed).rglob("*.png")):
        kind = path.parent.name
        path.rename(folder / f"{kind}-{path.name}")
        lines.append(json.dumps({"file_name": f"{kind}-{path.name}", "text": f"a grey {kind}"}))
    for kind in ("box", "cross", "disc"):
        (folder / kind).rmdir()
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


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
