"""Name what is in a picture by its caption: CLIP, learnt on plain shapes, goes to crowded ones.

    python examples/captions.py               # about a minute

Pre-training pairs pictures of twelve kinds (a colour and a shape) with "a picture of a red disc".
The task has a speckled ground, and two shapes whose words the model has never read. A picture
is of the kind whose caption it agrees with best.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import torch
from torch import nn
from transferred import compare, split, trained
from transformers import CLIPConfig, CLIPModel

COLOURS = {"red": (230, 60, 50), "green": (60, 180, 80), "blue": (60, 90, 220)}
OLD, NEW = ("disc", "box", "cross", "ring"), ("bar", "corner")
WORDS = ("<pad>", "<start>", "<end>", "a", "picture", "of", *COLOURS, *OLD, *NEW)
RECIPES = {"full(targets='*projection')": 3e-3, "norms": 1e-2, "houlsby(bottleneck=16)": 3e-3,
           "maple(length=4, layers=3)": 3e-2, "lora(rank=8)": 3e-3, "full": 1e-3}
SIDE = 24


def captions(kinds: list[tuple[str, str]]) -> torch.Tensor:
    said = [("<start>", "a", "picture", "of", "a", *kind, "<end>") for kind in kinds]
    return torch.tensor([[WORDS.index(w) for w in s] for s in said])


def picture(g: np.random.Generator, colour: str, shape: str, plain: bool) -> np.ndarray:
    """(3, SIDE, SIDE) between -1 and 1."""
    y, x = np.mgrid[:SIDE, :SIDE] - g.uniform(9, 15, 2)[:, None, None]
    r, far = g.uniform(5, 8), np.hypot(y, x)
    inside = {"disc": far < r, "box": np.maximum(abs(x), abs(y)) < 0.85 * r,
              "ring": abs(far - 0.8 * r) < 1.3, "bar": (abs(y) < 1.6) & (abs(x) < r),
              "cross": (np.minimum(abs(x), abs(y)) < 1.5) & (far < r),
              "corner": (x > -r) & (y > -r) & (np.minimum(x, y) < 2 - r) & (np.maximum(x, y) < r)}
    ground = np.full((3, SIDE, SIDE), g.uniform(90, 240)) if plain else g.choice(
        [60, 110, 150], (1, SIDE, SIDE)).repeat(3, 0).astype(float)
    ground[:, inside[shape]] = np.array(COLOURS[colour])[:, None]
    return (ground + g.normal(0, 12, ground.shape)) / 127.5 - 1


def pictures(kinds: list[tuple[str, str]], each: int, plain: bool, seed: int
             ) -> tuple[torch.Tensor, torch.Tensor]:
    g = np.random.default_rng(seed)
    rows = [picture(g, *kind, plain) for _ in range(each) for kind in kinds]
    return torch.tensor(np.stack(rows), dtype=torch.float32), torch.arange(len(kinds)).repeat(each)


def made() -> CLIPModel:
    body = {"num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 32,
            "hidden_size": 64, "intermediate_size": 128}
    return CLIPModel(CLIPConfig(
        text_config={**body, "vocab_size": len(WORDS), "max_position_embeddings": 8,
                     "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**body, "image_size": SIDE, "patch_size": 4},
        projection_dim=32, logit_scale_init_value=2.0))


def main(each: int = 150, few: int = 12, epochs: int = 8, first: int = 6) -> dict[str, float]:
    old, kinds = (list(itertools.product(COLOURS, s)) for s in (OLD, OLD + NEW))

    def loss(out: Any, batch: dict[str, Any]) -> torch.Tensor:
        return nn.functional.cross_entropy(out.logits_per_image, batch["which"])

    def batches(rows: tuple[torch.Tensor, torch.Tensor], said: torch.Tensor, size: int
                ) -> list[Any]:
        return [{"input_ids": said, "pixel_values": rows[0][i], "which": rows[1][i]}
                for i in split(len(rows[0]), size)]

    def seen(batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in batch.items() if k != "which"}

    torch.manual_seed(0)
    base = trained(made(), batches(pictures(old, each, True, 0), captions(old), 32), 1e-3, first,
                   lambda model, b: loss(model(**seen(b)), b))
    judged, which = pictures(kinds, 12, False, 2)

    def right(model: nn.Module) -> float:
        said = model(input_ids=captions(kinds), pixel_values=judged).logits_per_image
        return float((said.argmax(-1) == which).float().mean())

    with torch.no_grad():
        print(f"as it was pre-trained: {right(base.eval()):.4f}")
    learnt = batches(pictures(kinds, few, False, 1), captions(kinds), 18)
    return compare(lambda: copy.deepcopy(base), [(seen(b), b) for b in learnt], right, RECIPES,
                   epochs=epochs, loss=lambda out, b: loss(out, b[1]))


if __name__ == "__main__":
    main()
