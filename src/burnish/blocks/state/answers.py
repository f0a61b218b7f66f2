"""What a model answered, with its tensors made anew: outputs come as a tensor, a tuple, a mapping,
or an object with fields, and stay what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def mapped(out: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """`out` with ``of(t)`` for every tensor t in it; `out` itself is not touched."""
    if isinstance(out, Tensor):
        return of(out)
    if isinstance(out, Mapping):
        made = {k: mapped(v, of) for k, v in out.items()}
        return type(out)(**made) if hasattr(out, "to_tuple") else type(out)(made)
    if isinstance(out, tuple | list):
        each = [mapped(v, of) for v in out]
        return type(out)(*each) if hasattr(out, "_fields") else type(out)(each)
    if hasattr(out, "__dict__"):
        new = copy.copy(out)
        for name, value in vars(out).items():
            object.__setattr__(new, name, mapped(value, of))
        return new
    return out


def detached(out: Any) -> Any:
    """`out` without the graph that made it."""
    return mapped(out, Tensor.detach)


def with_logits(out: Any, logits: Tensor, new: Tensor) -> Any:
    """`out` with `new` in the place of its own tensor `logits`."""
    return mapped(out, lambda t: new if t is logits else t)
