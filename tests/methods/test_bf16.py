"""Weights held in bfloat16."""

from __future__ import annotations

import torch
from torch import nn

import burnish


def test_a_weight_that_is_bfloat16_stays_what_it_is():
    """Others are held anew, rounded once."""
    net = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8))
    own, other = net[0].weight, net[1].weight.detach().clone()
    burnish.tune(net, "bf16 + lora(rank=2)", targets="0,1", head=False)
    assert net[0]._parameters["weight"] is own and own.numel() == 64
    x = torch.randn(3, 8)
    want = x @ other.bfloat16().float().T + net[1].bias
    torch.testing.assert_close(net[1](x), want)
