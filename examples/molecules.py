"""Tell graphs that look like molecules: a small graph network, trained on one question and moved
to another.

    python examples/molecules.py              # a minute

Molecules are grown atom by atom, with no more bonds than an atom may have, and rings are closed.
What has been learned by counting the bonds between two kinds of atoms is moved to another question,
whether an atom is bound to both of them, of which few answers are known. Nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import nn

import burnish
from burnish.testing.graphs import GraphNetwork, molecules

RECIPES = {"linear probe": ("linear_probe", 5e-3), "LoRA": ("lora(rank=8)", 3e-3),
           "adapters": ("parallel(bottleneck=16)", 3e-3), "full": ("full", 1e-3)}


def labelled(count: int, seed: int, question: str, classes: int):
    nodes, adjacency, said = molecules(count, seed)
    labels = torch.tensor([min(s[question], classes - 1) for s in said])
    return {"nodes": nodes, "adjacency": adjacency, "labels": labels}


def learn(model, recipe: str, lr: float, data, steps: int, batch: int = 32, seed: int = 0):
    """The tuned model, after so many steps on batches drawn from the graphs."""
    tuned = burnish.tune(model, recipe, targets="fc1,fc2" if recipe.startswith("lora") else None)
    tuned.total_steps = steps
    tuned.optimizer(lr=lr)
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(data["labels"]), (batch,), generator=g)
        tuned.step({k: t[some] for k, t in data.items()})
    return tuned


@torch.no_grad()
def right(model, data) -> float:
    """The share of graphs that are told right."""
    return float((model.eval()(**data).logits.argmax(-1) == data["labels"]).float().mean())


def main(steps: int = 400, after: int = 200, few: int = 60) -> dict[str, float]:
    torch.manual_seed(0)
    model = GraphNetwork(width=64, blocks=4, classes=3)
    base = learn(model, "full", 1e-3, labelled(2000, 1, "pairs", 3), steps).model
    print(f"bonds counted: {right(base, labelled(400, 2, 'pairs', 3)):.1%} right; atoms bound to "
          f"both kinds, {few} graphs:")
    some, rest = labelled(few, 3, "between", 2), labelled(400, 4, "between", 2)
    found = {}
    for name, (recipe, lr) in RECIPES.items():
        fresh = GraphNetwork(width=64, blocks=4, classes=3)
        fresh.load_state_dict({k: v for k, v in base.state_dict().items() if "burnish" not in k})
        torch.manual_seed(0)
        fresh.head = nn.Linear(fresh.head.in_features, 2)
        tuned = learn(fresh, recipe, lr, some, after)
        count = sum(p.numel() for p in tuned.parameters())
        found[name] = right(tuned.model, rest)
        print(f"{name:<14} {count:>8,} trained   {found[name]:.1%} right")
    return found


if __name__ == "__main__":
    main()
