"""Parameters without a single entry train with everything else, whatever steps them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import burnish


class Some(nn.Module):
    """Two blocks, a matrix of no rows and a vector of no entries."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        self.rows, self.entries = nn.Parameter(torch.empty(0, 8)), nn.Parameter(torch.empty(0))

    def forward(self, x):
        return self.blocks(x) + self.rows.sum() + self.entries.sum()


def loss(out, batch):
    return (out - batch[1]).square().mean()


@pytest.mark.parametrize("update", [
    "adamw", "sgd", "lion", "adafactor", "adam8bit", "adam4bit", "kahan", "master_weights",
    "stochastic_rounding", "mezo", "step_in_backward", "galore(rank=2, targets='blocks')",
    "apollo(rank=2, targets='blocks')", "fira(rank=2, targets='blocks')"])
def test_an_empty_tensor_is_stepped_as_nothing(update):
    torch.manual_seed(0)
    model, batch = Some(), (torch.randn(4, 8), torch.randn(4, 8))
    before = [p.detach().clone() for p in model.parameters()]
    tuned = burnish.tune(model, f"full + {update}")
    tuned.optimizer(lr=1e-2)
    for _ in range(2):
        assert torch.isfinite(tuned.step(batch, loss))
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(m == bool(p.numel()) for m, p in zip(moved, model.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())

