"""A few steps that are only lent: tensors are moved, looked at, and put back bit for bit.

The moments are the steps' own and go with them, so nothing of one sample reaches the next, and an
optimizer that trains the same tensors knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .rules import AdamW, accumulator, move


@contextmanager
def lent(params: Mapping[str, nn.Parameter], gradients: Callable[[], Mapping[str, Tensor]],
         steps: int, lr: float, rule: Any = None) -> Iterator[None]:
    """Inside, `params` stand where `steps` steps of `rule` (AdamW) from nothing take them.

    gradients: of the loss at the point where they stand, by name; a tensor without one stays.
    """
    rule = AdamW() if rule is None else rule
    kept = {n: p.detach().clone() for n, p in params.items()}
    states: dict[str, dict[str, Tensor]] = {}
    try:
        for t in range(1, steps + 1):
            for name, g in gradients().items():
                p = params[name]
                with torch.no_grad():
                    x = p.detach().to(accumulator(p.dtype))     # p itself, or wider
                    state = states.setdefault(name, rule.init(x))
                    move(rule, [x], [g.to(x.dtype)], {k: [v] for k, v in state.items()}, t,
                         rule.hyper(), lr, rule.weight_decay)
                    p.copy_(x)
        yield
    finally:
        with torch.no_grad():
            for name, was in kept.items():
                params[name].copy_(was)
