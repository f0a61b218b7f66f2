"""What every autograd function of ours keeps to.

* Its result may be changed in place, so it is no view (:func:`shaped`).
* What it reads again in backward is as it was, or backward raises (:class:`~.notes.Seen`); who
  wants a gradient is decided in forward (:func:`as_required`), as autograd has it.
* Where it cannot be differentiated, twice or under ``torch.func``, it says so, or steps aside for
  plain functions (:func:`transformed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh result in another shape, and no view: views made inside a function are read-only.

    Nobody else may hold `y`.
    """
    return y if y.shape == torch.Size(shape) else torch.ops.aten._unsafe_view.default(y, shape)


def transformed() -> bool:
    """Is a transform at work (``torch.func.grad``, ``vmap``, forward-mode differentiation)?

    It differentiates what runs, operation by operation, so functions with a backward of their own
    give way to the plain form, and nothing is kept leaner than stock.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@contextmanager
def as_required(tensors: Sequence[Tensor], flags: Sequence[bool]) -> Iterator[None]:
    """Tensors require gradients inside as they did in forward (adapters may have been switched)."""
    moved = [(t, f) for t, f in zip(tensors, flags, strict=True) if t.requires_grad != f]
    try:
        for t, f in moved:
            t.requires_grad_(f)
        yield
    finally:
        for t, f in moved:
            t.requires_grad_(not f)
