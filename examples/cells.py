"""Tell malign cells from benign ones: a table of numbers, and a network learnt on other cells.

    python examples/cells.py                  # seconds

scikit-learn's breast-cancer cells: the smaller half, by mean radius, pre-trains a network of three
layers in plain torch; 60 of the larger half are learnt, and the rest judged. TabM trains 8 networks
that share their matrices; its first inputs are multiplied by random signs, so it starts anew.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from transferred import compare, split, trained

RECIPES = {"linear_probe": 1e-2, "lora(rank=4)": 3e-3, "ssf": 1e-2, "full": 1e-3,
           "tabm(k=8)": 3e-3, "tabm(k=8, init='ones', head_start='copied')": 3e-3}


def main(epochs: int = 20, first: int = 200) -> dict[str, float]:
    bunch = load_breast_cancer()
    x, y = torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target)
    small = x[:, 0] < x[:, 0].median()
    x = (x - x[small].mean(0)) / x[small].std(0)
    torch.manual_seed(0)
    base = trained(nn.Sequential(nn.Linear(30, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
                                 nn.Linear(64, 2)),
                   [(x[small], y[small])], 1e-3, first,
                   lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1]))
    x, y = x[~small], y[~small]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    learnt, judged = order[:60], order[60:]

    def right(model: nn.Module) -> float:
        return float((model(x[judged]).argmax(-1) == y[judged]).float().mean())

    print(f"as it was pre-trained: {right(base.eval()):.4f}")
    batches = [(x[learnt[i]], y[learnt[i]]) for i in split(60, 16)]
    return compare(lambda: copy.deepcopy(base), batches, right, RECIPES, epochs=epochs,
                   loss=lambda out, b: nn.functional.cross_entropy(out, b[1]))


if __name__ == "__main__":
    main()
