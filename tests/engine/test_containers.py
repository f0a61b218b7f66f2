"""A tuned container still iterates, counts and slices like the container it is."""

from __future__ import annotations

import torch
from torch import nn

import burnish


def layers():
    return nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)


def test_a_tuned_sequential_is_a_sequential():
    model = nn.Sequential(*layers())
    x = torch.randn(3, 6)
    before = model(x)
    tuned = burnish.tune(model, "lora(rank=2)", head=False)
    assert torch.equal(model(x), before)
    assert len(model) == 3 and [type(m).__name__ for m in model] == ["Linear", "Tanh", "Linear"]
    assert model[-1] is model[2] and isinstance(model[-1], nn.Linear)
    assert len(model[:-1]) == 2 and type(model[1:]) is nn.Sequential
    assert torch.equal(nn.Sequential(*model)(x), before)
    tuned.detach()
    assert torch.equal(model(x), before) and len(model) == 3


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Sequential(*layers()) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})

    def forward(self, x):
        for step in self.steps:
            x = x + step(x)
        return sum(layer(x) for layer in self.named.values())


def test_lists_and_dicts_of_modules():
    model, x = Listed(), torch.randn(3, 6)
    before = model(x)
    tuned = burnish.tune(model, "lora(rank=2) + lean", head=False)
    assert torch.equal(model(x), before)
    tuned.step((x, before), loss=lambda out, b: (out - b[1] - 1).square().mean())
    assert len(model.steps) == 3 and list(model.named) == ["a", "b"]
    assert not torch.equal(model(x), before)
    with tuned.disabled():
        assert torch.equal(model(x), before)
