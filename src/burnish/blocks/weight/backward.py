"""What every hand-written backward here needs: no second cast, and the call of its forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.call import resume


def uncast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(ctx, tensor, ...)` in the tensors' own precision: autocast has had its say before."""
    @functools.wraps(fn)
    def run(ctx: Any, tensor: Tensor, *rest: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return fn(ctx, tensor, *rest)
    return run


def as_then(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Terms and the base are asked again in the call of the forward, not in the present."""
    @functools.wraps(backward)
    def run(ctx: Any, g: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, g)
        with resume(ctx.call):
            return backward(ctx, g)
    return run
