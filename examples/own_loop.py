"""Tune a plain PyTorch model in a plain PyTorch loop: new classes for a small network.

    python examples/own_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import burnish


def train(model, optimizer, x, y, steps):
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=draw)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def main():
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                          nn.Linear(256, 10))
    first = y < 5                                   # pre-train on 0-4, tune to 5-9
    train(model, torch.optim.AdamW(model.parameters(), 1e-3),
          x[first], y[first], steps=150)

    tuned = burnish.tune(model, "lora(rank=4)", head=False, targets="0,2,4")
    rest, truth = x[~first], y[~first]
    before = accuracy(model, rest[200:], truth[200:])
    train(model, tuned.optimizer(lr=1e-2), rest[:200], truth[:200], steps=150)
    print(tuned)
    print(f"accuracy on 5-9, never seen before tuning: {before:.3f} -> "
          f"{accuracy(model, rest[200:], truth[200:]):.3f}")
    tuned.detach()
    print(f"accuracy on 0-4 after detach: {accuracy(model, x[first], y[first]):.3f}")


if __name__ == "__main__":
    main()
