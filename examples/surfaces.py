"""Tell surfaces by clouds of points: a small transformer, trained on some and moved to others.

    python examples/surfaces.py               # a minute

Spheres, tori, boxes and cones are sampled, stretched, turned at random and in noise; what has been
learned of six of them is moved to six others, of which there are a few clouds each. Nothing is
downloaded. With a Point-MAE of your own it is ``burnish.tune(model, "point_gst")``: any model whose
``group_divider`` returns the centres of its groups.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transferred import compare, split, trained

from burnish.testing.points import PointTransformer, surfaces

KNOWN = ("sphere", "torus", "box", "cone", "saddle", "helix")
OTHERS = ("cylinder", "octahedron", "hourglass", "barrel", "spindle", "bowl")
RECIPES = {"linear_probe": 5e-3, "lora(rank=8)": 3e-3, "point_gst(rank=16, local=8)": 3e-3,
           "full": 1e-3}


def loss(out: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(out.logits, batch[1])


def main(many: int = 200, first: int = 8, epochs: int = 75, few: int = 10) -> dict[str, float]:
    def batches(rows: tuple[torch.Tensor, torch.Tensor]) -> list[Any]:
        return [(rows[0][i], rows[1][i]) for i in split(len(rows[0]), 32)]

    def right(rows: tuple[torch.Tensor, torch.Tensor], model: nn.Module) -> float:
        return float((model(rows[0]).logits.argmax(-1) == rows[1]).float().mean())

    torch.manual_seed(0)
    base = trained(PointTransformer(width=64, blocks=3, groups=24, neighbours=12,
                                    classes=len(KNOWN)),
                   batches(surfaces(KNOWN, many, seed=1)), 1e-3, first,
                   lambda model, b: loss(model(b[0]), b))
    with torch.no_grad():
        print(f"{len(KNOWN)} surfaces known: {right(surfaces(KNOWN, 40, seed=2), base.eval()):.4f}")
    base.head = nn.Linear(base.head.in_features, len(OTHERS))
    judged = surfaces(OTHERS, 60, seed=4)
    return compare(lambda: copy.deepcopy(base), batches(surfaces(OTHERS, few, seed=3)),
                   lambda model: right(judged, model), RECIPES, loss=loss, epochs=epochs)


if __name__ == "__main__":
    main()
