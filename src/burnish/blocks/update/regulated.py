"""Gradients that a small learned function holds back or lets through, number by number.

    Psi(g) = 2 sigmoid(g W^T + b) * g           g (..., d) the gradient of rows of width d

W (d, d) and b (d) are zero at the start: Psi(g) = g. One W and b serve all rows of a width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module

from ...core.errors import ConfigError


class Regulation(nn.Module):
    """Psi, for rows of the widths that `params` have. Its tensors are a file of their own
    (``state_dict``); `width.512.weight` is W at 512."""

    def __init__(self, params: Mapping[str, Tensor]):
        super().__init__()
        self.width = nn.ModuleDict()
        for p in params.values():
            if p.dim() and str(p.shape[-1]) not in self.width:
                gate = nn.Linear(p.shape[-1], p.shape[-1], device=p.device)
                for tensor in gate.parameters():
                    nn.init.zeros_(tensor)
                self.width[str(p.shape[-1])] = gate

    def check(self, params: Mapping[str, Tensor]) -> None:
        """ConfigError where one of these has rows of a width that no gate was made for."""
        for name, p in params.items():
            if p.dim() and str(p.shape[-1]) not in self.width:
                raise ConfigError(f"gram: {name} has rows of {p.shape[-1]}, and this psi was "
                                  f"learned for rows of {', '.join(self.width) or 'no width'}: "
                                  "learn one with what trains here, or train what it knows")

    def forward(self, g: Tensor) -> Tensor:
        gate: Any = self.width[str(g.shape[-1])] if g.dim() else None
        if gate is None:
            return g
        wide = g.to(gate.weight.dtype)
        return (2 * torch.sigmoid(gate(wide)) * wide).to(g.dtype)

    @contextmanager
    def regulating(self, optimizer: Any) -> Iterator[None]:
        """Inside, every gradient passes Psi on its way into the optimizer's step; Psi stays as it
        is. ConfigError for an optimizer whose step reads no gradients, or has tensors with rows of
        a width that no gate was made for."""
        if getattr(optimizer, "zeroth_order", False) or hasattr(optimizer, "muted"):
            raise ConfigError("gram changes gradients that wait for the step, and this recipe's "
                              "step has none: it evaluates, or steps while backward runs")

        every = [p for group in optimizer.param_groups for p in group["params"]]
        self.check({f"tensor {n} of the optimizer": p for n, p in enumerate(every)})

        @torch.no_grad()
        def change(opt: Any, *_: Any) -> None:
            for p in (p for group in opt.param_groups for p in group["params"]):
                if p.grad is not None:
                    p.grad = self(p.grad)

        handle = optimizer.register_step_pre_hook(change)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _at(model: nn.Module, theta: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these tensors stand for the model's, with their graph."""
    with _reparametrize_module(model, dict(theta)):
        yield


def adapted(model: nn.Module, theta: Mapping[str, Tensor], loss: Callable[[], Tensor],
            psi: Callable[[Tensor], Tensor], rate: float, updates: int, second: bool
            ) -> dict[str, Tensor]:
    """``theta - rate Psi(grad L(theta))``, `updates` times, as functions of theta and of Psi.

    loss: L at the tensors that stand in the model. second: with the derivative of the gradient,
    for what autograd computes by itself (a backward written by hand has none); else a gradient is
    a number. Psi's parameters are reached either way.
    """
    here = dict(theta)
    for _ in range(updates):
        with _at(model, here), sdpa_kernel(SDPBackend.MATH):
            value = loss()
        grads = torch.autograd.grad(value, list(here.values()), create_graph=second,
                                    allow_unused=True)
        here = {n: p if g is None else p - rate * psi(g if second else g.detach())
                for (n, p), g in zip(here.items(), grads, strict=True)}
    return here


def at(model: nn.Module, theta: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> Tensor:
    """The loss where the model's tensors are these."""
    with _at(model, theta), sdpa_kernel(SDPBackend.MATH):
        return loss()
