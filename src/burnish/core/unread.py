"""Parameters whose values are still in files: read one at a time, when they are needed.

Such a parameter has its shape, dtype and device, and one entry of memory (NaN, expanded to the
shape), so that a model much larger than memory can be looked at, and a recipe joined to it. Whoever
needs the values asks for them (:func:`values`); a storage keeps its own form of them and lets the
parameter go (:func:`let_go`); what is left in the end is read for good (:func:`read_all`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ConfigError

_MARK = "_burnish_unread"
#: bytes from which a tensor waits in its file
WAITS = 1 << 16


class Source(Protocol):
    """Where one parameter's values are."""

    def read(self) -> Tensor:
        """The values, in memory of their own on the host."""
        ...


def blank(shape: Any, dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """One entry that stands for a tensor of this shape; what reads it finds NaN."""
    one = torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device)
    return one.expand(shape)


def mark(parameter: nn.Parameter, source: Source) -> None:
    """The parameter's values are in `source` from now on."""
    setattr(parameter, _MARK, source)


def source_of(parameter: Any) -> Source | None:
    """Where the values of a parameter are that has not been read; None for any other tensor."""
    return None if parameter is None else parameter.__dict__.get(_MARK)


def is_unread(model: nn.Module) -> bool:
    """Are values of any parameter still in files?"""
    return any(source_of(p) is not None for p in model.parameters())


@contextlib.contextmanager
def values(parameter: Any) -> Iterator[None]:
    """Inside, the parameter has its values; afterwards it is as before, unless it was let go."""
    source = source_of(parameter)
    if source is None:
        yield
        return
    waiting = parameter.data
    _put(parameter, source)
    try:
        yield
    finally:
        if source_of(parameter) is not None:
            parameter.data = waiting


def let_go(parameter: nn.Parameter) -> None:
    """What the parameter holds now is its own affair; its file is not asked again."""
    parameter.__dict__.pop(_MARK, None)


def read_all(model: nn.Module) -> None:
    """Give every parameter that is left its values, for good; the model can run from now on."""
    for p in model.parameters():
        if (source := source_of(p)) is not None:
            _put(p, source)
            let_go(p)
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is closed:
            del model._forward_pre_hooks[key]


def close(model: nn.Module) -> None:
    """Refuse to run the model until it is read."""
    model.register_forward_pre_hook(closed)


def closed(model: nn.Module, args: Any) -> None:
    """A forward pre-hook: NaN must not pass for an answer."""
    raise ConfigError(f"the weights of this {type(model).__name__} are still in its files: join a "
                      "recipe first (burnish.tune), which reads them one by one, or load the model "
                      "whole")


@torch.no_grad()
def _put(parameter: nn.Parameter, source: Source) -> None:
    value = source.read()
    if value.shape != parameter.shape:
        raise ConfigError(f"a parameter of shape {list(parameter.shape)} was read as "
                          f"{list(value.shape)}")
    parameter.data = value.to(parameter.device, parameter.dtype)
