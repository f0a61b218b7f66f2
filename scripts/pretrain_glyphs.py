"""Pre-train the small vision transformer that ships with burnish, on rendered glyphs.

The model never sees handwriting here: it learns to name the 62 digits and Latin letters of the
typefaces that matplotlib ships (DejaVu, STIX, Computer Modern), drawn at 32 x 32 and bent,
slanted, thickened, thinned, blurred and dirtied at random. `burnish demo` then fine-tunes it to
the 1,797 scanned handwritten digits of scikit-learn, which is a true transfer from print to pen.

Shapes: image (1, 16, 16), patch 4, so 16 tokens and one class token; width 96, 4 heads, 6 layers;
0.67 million parameters, kept in fp16 in the file and loaded as fp32 (the config says so).

Half of the pictures pass through 8 x 8 on their way to 16 x 16, by the same counting of 4 x 4
cells of a 32 x 32 bitmap that made scikit-learn's digits.

Run (a few minutes on one core)::

    python scripts/pretrain_glyphs.py                       # into src/burnish/fit/assets
    python scripts/pretrain_glyphs.py --steps 20 --out x    # a quick look

The seed is fixed; the same torch on the same machine with one thread gives the same file.
"""

from __future__ import annotations

import argparse
import json
import string
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta",
    "STIXGeneralItalic", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10",
)
HOME = Path(__file__).resolve().parents[1] / "src" / "burnish" / "fit" / "assets" / "glyph-vit"


def glyphs(side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Every character in every typeface: ink in [0, 1] as (G, side, side), and its class (G,)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pictures, labels = [], []
    for name in FONTS:
        font = ImageFont.truetype(str(fonts / f"{name}.ttf"), size=2 * side)
        for label, character in enumerate(CHARACTERS):
            sheet = Image.new("L", (4 * side, 4 * side))
            ImageDraw.Draw(sheet).text((side, side // 2), character, fill=255, font=font)
            ink = sheet.crop(sheet.getbbox())
            # fit into three quarters of the square, aspect kept
            k = 0.75 * side / max(ink.size)
            size = (max(1, round(ink.width * k)), max(1, round(ink.height * k)))
            ink = ink.resize(size, Image.Resampling.BOX)
            square = Image.new("L", (side, side))
            square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
            pictures.append(torch.from_numpy(np.array(square, dtype=np.float32) / 255))
            labels.append(label)
    return torch.stack(pictures), torch.tensor(labels)


def uniform(n: int, low: float, high: float, g: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, generator=g)


def distort(ink: torch.Tensor, g: torch.Generator, bend: float) -> torch.Tensor:
    """Random pen, hand and scanner: (N, 64, 64) in [0, 1] to (N, 1, 16, 16) in [-1, 1]."""
    n = len(ink)
    angle, shear = uniform(n, -0.3, 0.3, g), uniform(n, -0.45, 0.45, g)
    wide, high = uniform(n, 0.75, 1.45, g), uniform(n, 0.7, 1.1, g)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0] = angle.cos() * wide
    affine[:, 0, 1] = angle.cos() * shear - angle.sin()
    affine[:, 1, 0] = angle.sin() * high
    affine[:, 1, 1] = angle.cos() * high
    affine[:, :, 2] = 0.2 * (torch.rand(n, 2, generator=g) - 0.5)
    grid = F.affine_grid(affine, [n, 1, 32, 32], align_corners=False)
    waves = bend * torch.randn(n, 2, 4, 4, generator=g)
    grid = grid + F.interpolate(waves, (32, 32), mode="bicubic").permute(0, 2, 3, 1)

    # the pen: wider or thinner strokes at 64 x 64, chosen per picture
    x = ink[:, None]
    pens = torch.stack([x, F.max_pool2d(x, 3, 1, 1), F.max_pool2d(x, 5, 1, 2),
                        -F.max_pool2d(-x, 3, 1, 1)])
    x = pens[torch.randint(4, (n,), generator=g), torch.arange(n)]
    x = F.grid_sample(x, grid, align_corners=False)

    # the scanner: a threshold, then counts of ink in cells; half of them by way of 8 x 8
    hard = (x > uniform(n, 0.3, 0.6, g)[:, None, None, None]).float()
    eight = F.interpolate(F.avg_pool2d(hard, 4), (16, 16), mode="bilinear")
    sixteen = F.avg_pool2d(x, 2)
    x = torch.where((torch.rand(n, 1, 1, 1, generator=g) < 0.5), eight, sixteen)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)
    x = torch.lerp(x, blurred, uniform(n, 0.0, 0.6, g)[:, None, None, None])
    x = x * uniform(n, 0.6, 1.2, g)[:, None, None, None]
    x = x + 0.06 * torch.randn(x.shape, generator=g)
    return x.clamp(0, 1) * 2 - 1


def build() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    names = dict(enumerate(CHARACTERS))
    return ViTForImageClassification(ViTConfig(
        hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=384,
        image_size=16, patch_size=4, num_channels=1, hidden_act="gelu",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        id2label=names, label2id={v: k for k, v in names.items()},
    ))


def train(steps: int, batch: int, lr: float, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    ink, label = glyphs()
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    started, seen = time.perf_counter(), []
    for step in range(1, steps + 1):
        i = torch.randint(len(ink), (batch,), generator=g)
        bend = 0.13 * min(1.0, step / (0.6 * steps))  # a small transformer starts on straight print
        logits = model(pixel_values=distort(ink[i], g, bend)).logits
        loss = F.cross_entropy(logits, label[i], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append((logits.argmax(-1) == label[i]).float().mean().item())
        if step % 100 == 0 or step == steps:
            recent = sum(seen[-100:]) / len(seen[-100:])
            print(f"step {step:5d}  loss {loss.item():.3f}  accuracy {recent:.3f}  "
                  f"{time.perf_counter() - started:.0f} s", flush=True)
    return model.eval()


def save(model: torch.nn.Module, folder: Path) -> None:
    """Config, weights in fp16, and how pictures are prepared."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {
        "architectures": ["ViTForImageClassification"], "dtype": "float32",
        "initializer_range": 0.02}  # the wide start served these weights, not a new head
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    half = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5], "image_std": [0.5],
    }, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HOME)
    args = parser.parse_args()
    torch.set_num_threads(1)
    save(train(args.steps, args.batch, args.lr, args.seed), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
