"""Draw as hands do: a diffusion transformer, learnt on printed figures, goes to handwriting.

    pip install diffusers
    python examples/strokes.py                # about a minute

Pre-training takes the noise out of printed figures from 0 to 9, shifted and of unlike weight; the
task is scikit-learn's scanned handwriting. Scores are mean squared errors of the noise that is
told, on handwriting that nobody has learnt, over those of a guess of none (lower is better).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import nn
from transferred import compare, split, trained

STEPS = 100
RECIPES = {"linear_probe": 1e-2, "bitfit": 3e-3, "lora(rank=8)": 3e-3,
           "houlsby(bottleneck=16)": 3e-3, "full": 1e-3}


def printed(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 1, 8, 8) between -1 and 1, and which figures they are."""
    g, rows, which = np.random.default_rng(seed), [], []
    for i in range(count):
        page = Image.new("L", (32, 32))
        ImageDraw.Draw(page).text(g.uniform(5, 12, 2), str(i % 10), 255,
                                  ImageFont.load_default(g.uniform(18, 26)),
                                  stroke_width=int(g.integers(0, 2)))
        rows.append(np.asarray(page.resize((8, 8), Image.Resampling.BOX), np.float32) / 127.5 - 1)
        which.append(i % 10)
    return torch.tensor(np.stack(rows)).unsqueeze(1), torch.tensor(which)


def noised(pictures: torch.Tensor, which: torch.Tensor, size: int, seed: int
           ) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Batches: what the model is given, and the noise that it is to tell."""
    schedule = DDPMScheduler(num_train_timesteps=STEPS)
    g, out = torch.Generator().manual_seed(seed), []
    for i in split(len(pictures), size, seed):
        noise = torch.randn(pictures[i].shape, generator=g)
        t = torch.randint(STEPS, (len(i),), generator=g)
        out.append(({"hidden_states": schedule.add_noise(pictures[i], noise, t), "timestep": t,
                     "class_labels": which[i]}, noise))
    return out


def made() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1)


def main(many: int = 2000, few: int = 200, epochs: int = 10, first: int = 4) -> dict[str, float]:
    torch.manual_seed(0)
    base = made()
    for epoch in range(first):                          # other noise each time
        trained(base, noised(*printed(many, 0), 32, epoch), 2e-3, 1, lambda model, b: loss(
            model(**b[0]), b))
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    which = torch.tensor(digits.target)
    learnt = noised(pictures[:few], which[:few], 25, 1)
    ((judged, truth),) = noised(pictures[few:few + 600], which[few:few + 600], 600, 2)

    def error(model: nn.Module) -> float:
        return float((model(**judged).sample - truth).square().mean() / truth.square().mean())

    with torch.no_grad():
        print(f"as it was pre-trained: {error(base.eval()):.4f}")
    return compare(lambda: copy.deepcopy(base), learnt, error, RECIPES, loss=loss, epochs=epochs,
                   word="error")


def loss(out: Any, batch: tuple[dict[str, Any], torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(out.sample, batch[1])


if __name__ == "__main__":
    main()
