"""An MLP in equal experts by a router that nobody trains, of which a token takes more or fewer.

    l = R x + r,  w = E softmax of the k largest l      y = sum_e w_e W2_e act(W1_e x + b1_e) + b2

All E experts with equal weights are the MLP itself, so k may be chosen anew at any time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tape.cast import uncast
from .routed import Routed, Routing, dealt


class Slimmed(Routed):
    """k: experts of a token in training; answers: in evaluation."""

    part, whole = "smoe_dropout", True

    def __init__(self, *args: Any, k: int, answers: int, router: nn.Linear | None):
        super().__init__(*args, k=k, router=router, part=self.part)
        self.answers = answers
        for p in () if router is None else router.parameters():
            p.requires_grad_(False)

    def route(self, x: Tensor) -> Routing:
        router: Any = self.router
        k, E = self.k if self.training else self.answers, router.out_features
        flat = x.reshape(-1, x.shape[-1])
        if k == E:                               # no question who, nor how much
            index = torch.arange(E, device=x.device).expand(len(flat), E)
            return dealt(x, index, E, None)
        wide = torch.promote_types(x.dtype, torch.float32)
        with uncast(x):
            likes = F.linear(flat.to(wide), router.weight.to(wide), router.bias.to(wide))
        value, index = likes.topk(k, -1)
        return dealt(x, index, E, None, value.softmax(-1) * E)
