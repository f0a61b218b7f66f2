"""Tell graphs that look like molecules: a small graph network, trained on one question and moved
to another.

    python examples/molecules.py              # a minute

Molecules are grown atom by atom, with no more bonds than an atom may have, and rings are closed.
What has been learned by counting the bonds between two kinds of atoms is moved to another question,
whether an atom is bound to both of them, of which few answers are known. Nothing is downloaded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transferred import compare, split, trained

from burnish.testing.graphs import GraphNetwork, molecules

RECIPES = {"linear_probe": 5e-3, "lora(rank=8, targets='fc1,fc2')": 3e-3,
           "parallel(bottleneck=16)": 3e-3, "full": 1e-3}


def labelled(count: int, seed: int, question: str, classes: int) -> dict[str, torch.Tensor]:
    nodes, adjacency, said = molecules(count, seed)
    labels = torch.tensor([min(s[question], classes - 1) for s in said])
    return {"nodes": nodes, "adjacency": adjacency, "labels": labels}


def main(many: int = 2000, first: int = 6, epochs: int = 60, few: int = 120) -> dict[str, float]:
    def batches(rows: dict[str, torch.Tensor]) -> list[Any]:
        return [{k: t[i] for k, t in rows.items()} for i in split(len(rows["labels"]), 32)]

    def right(rows: dict[str, torch.Tensor], model: nn.Module) -> float:
        return float((model(**rows).logits.argmax(-1) == rows["labels"]).float().mean())

    torch.manual_seed(0)
    base = trained(GraphNetwork(width=64, blocks=4, classes=3), batches(
        labelled(many, 1, "pairs", 3)), 1e-3, first, lambda model, b: model(**b).loss)
    with torch.no_grad():
        print(f"bonds counted: {right(labelled(400, 2, 'pairs', 3), base.eval()):.4f}")
    base.head = nn.Linear(base.head.in_features, 2)
    judged = labelled(400, 4, "between", 2)
    return compare(lambda: copy.deepcopy(base), batches(labelled(few, 3, "between", 2)),
                   lambda model: right(judged, model), RECIPES, epochs=epochs)


if __name__ == "__main__":
    main()
