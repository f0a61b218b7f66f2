"""A stream that takes no time: clouds of points in the plane and a small network."""

from __future__ import annotations

import math

import torch
from torch import nn

from burnish.continual import Stream, Training, by_class, by_domain


def points(classes: int, rows: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Round a circle, a cloud for each class."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for c in range(classes):
        at = 3 * torch.tensor([math.cos(2 * math.pi * c / classes),
                               math.sin(2 * math.pi * c / classes)])
        out += [(at + 0.3 * torch.randn(2, generator=g), c) for _ in range(rows)]
    return out


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
                         nn.Linear(16, width))


def plane(scenario: str = "class", seed: int = 0, data: str = "plane", classes: int = 6,
          increment: int = 2, **more) -> Stream:
    train, test = points(classes, 16, 2 * seed), points(classes, 8, 2 * seed + 1)
    width = classes
    if scenario == "domain":
        turn = {f"by {k}": torch.tensor([[math.cos(k), -math.sin(k)], [math.sin(k), math.cos(k)]])
                for k in range(3)}
        tasks = by_domain({n: tuple([(m @ x, c) for x, c in rows] for rows in (train, test))
                           for n, m in turn.items()})
    else:
        tasks = by_class(train, test, increment=increment, order=seed)
    return Stream(f"{data}, by {scenario}", data, scenario, tasks, lambda: network(width),
                  torch.stack, **{"training": Training(epochs=6, batch=8, rate=3e-2), **more})
