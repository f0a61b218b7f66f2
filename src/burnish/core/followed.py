"""Who follows a model as it runs: a compiler, torch.export, torch.jit.trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class _Here(threading.local):
    beside = 0


_here = _Here()


def compiling() -> bool:
    """Is this being made into a graph whose maker decides what is kept?"""
    if not torch.compiler.is_compiling():
        return False
    return not (torch.compiler.is_exporting() and _here.beside)


def step_by_step() -> bool:
    """Is every operation written down as it comes? Then each must be one that torch has."""
    return torch.jit.is_tracing() or _here.beside > 0


def written_down() -> bool:
    """Is a program made of this, which may not go by what values are now?"""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_fake(t: Tensor) -> bool:
    """Has the tensor a shape but no values (meta, or under FakeTensorMode)?"""
    return t.device.type == "meta" or isinstance(t, FakeTensor)


def simulated(t: Tensor) -> bool:
    """Is it of a run that only asks what it costs: has it no values, and does nobody write down
    what is computed with it (torch.export does, on tensors that look the same)?"""
    return is_fake(t) and not torch.compiler.is_exporting()


@contextmanager
def beside_graph() -> Iterator[None]:
    """Inside, the model runs as it is. torch.export, unlike a compiler, follows it there too."""
    more = torch.compiler.is_exporting()
    _here.beside += more
    try:
        yield
    finally:
        _here.beside -= more
