"""Tell surfaces by clouds of points: a small transformer, trained on some and moved to others.

    python examples/surfaces.py               # a minute

Spheres, tori, boxes and cones are sampled, stretched, turned at random and in noise; what has been
learned of six of them is moved to six others, of which there are a few clouds each. Nothing is
downloaded. With a Point-MAE of your own it is ``burnish.tune(model, "point_gst")``: any model whose
``group_divider`` returns the centres of its groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import burnish
from burnish.testing.points import PointTransformer, surfaces

KNOWN = ("sphere", "torus", "box", "cone", "saddle", "helix")
OTHERS = ("cylinder", "octahedron", "hourglass", "barrel", "spindle", "bowl")
RECIPES = {"linear probe": ("linear_probe", 5e-3), "LoRA": ("lora(rank=8)", 3e-3),
           "PointGST": ("point_gst(rank=16, local=8)", 3e-3), "full": ("full", 1e-3)}


def learn(model, recipe: str, lr: float, data, steps: int, batch: int = 32, seed: int = 0):
    """The tuned model, after so many steps on batches drawn from the clouds."""
    tuned = burnish.tune(model, recipe)
    tuned.total_steps = steps
    tuned.optimizer(lr=lr)
    g = torch.Generator().manual_seed(seed)
    x, y = data
    for _ in range(steps):
        some = torch.randint(len(x), (batch,), generator=g)
        tuned.step((x[some], y[some]), loss=lambda out, b: F.cross_entropy(out.logits, b[1]))
    return tuned


@torch.no_grad()
def right(model, data) -> float:
    """The share of clouds that are told right."""
    x, y = data
    return float((model.eval()(x).logits.argmax(-1) == y).float().mean())


def main(steps: int = 300, after: int = 150, few: int = 10) -> dict[str, float]:
    torch.manual_seed(0)
    model = PointTransformer(width=64, blocks=3, groups=24, neighbours=12, classes=len(KNOWN))
    base = learn(model, "full", 1e-3, surfaces(KNOWN, 200, seed=1), steps).model
    print(f"{len(KNOWN)} surfaces known: {right(base, surfaces(KNOWN, 40, seed=2)):.1%} right; "
          f"{len(OTHERS)} others, {few} clouds each:")
    some, rest = surfaces(OTHERS, few, seed=3), surfaces(OTHERS, 60, seed=4)
    found = {}
    for name, (recipe, lr) in RECIPES.items():
        fresh = PointTransformer(width=64, blocks=3, groups=24, neighbours=12, classes=len(KNOWN))
        fresh.load_state_dict({k: v for k, v in base.state_dict().items() if "burnish" not in k})
        torch.manual_seed(0)
        fresh.head = nn.Linear(fresh.head.in_features, len(OTHERS))
        tuned = learn(fresh, recipe, lr, some, after)
        count = sum(p.numel() for p in tuned.parameters())
        found[name] = right(tuned.model, rest)
        print(f"{name:<14} {count:>8,} trained   {found[name]:.1%} right")
    return found


if __name__ == "__main__":
    main()
