"""The lean tape as a part of a recipe: it is on unless it is switched off."""

from __future__ import annotations

import torch
from torch import nn

import burnish


def waiting(recipe):
    """Bytes at the peak of a step of a norm, a GELU and two linears."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(),
                        nn.Linear(64, 16))
    return burnish.simulate(net, recipe, (torch.randn(64, 16),),
                            loss=lambda out, batch: out.square().mean()).peak_bytes


def test_it_is_on_unless_it_is_switched_off():
    assert waiting("full + lean") == waiting("full") < waiting("full + lean(on=False)")
