"""The class swap: a touched module becomes a subclass of its own class, under the same name.

``isinstance`` holds, no parameter is renamed or moved, and the way back is one assignment.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from .containers import members

#: the one child a touched module gets
ATTR = "burnish"

_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


def tuned_class(base: type, provided: tuple[str, ...] = ()) -> type:
    """The subclass of `base`, under the same name, whose forward goes through its slot."""
    key = (base, provided)
    if key not in _CLASSES:
        own = base.forward

        @functools.wraps(own)                    # signature(model.forward) stays the base's
        def forward(self: nn.Module, *args: Any, **kw: Any) -> Any:
            slot = self._modules.get(ATTR)       # a fresh type(module)(...) has none
            return own(self, *args, **kw) if slot is None else slot.run(self, own, args, kw)

        def reduce(self: nn.Module, protocol: Any = None) -> tuple:
            return _rebuild, (base, provided), self.__dict__

        body: dict[str, Any] = {
                "forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__,
                "__qualname__": base.__qualname__, "__doc__": base.__doc__,
                "_burnish_base": base, **members(base)}
        for name in provided:
            body[name] = property(functools.partial(_provided, name=name))
        _CLASSES[key] = type(base.__name__, (base,), body)
    return _CLASSES[key]


def _provided(module: nn.Module, name: str) -> Tensor:
    """``module.<name>`` where a provider holds it."""
    slot = module._modules.get(ATTR)
    if slot is not None:
        return slot.answer(module, name)
    if name in module._parameters:
        return module._parameters[name]
    raise AttributeError(name)


def _rebuild(base: type, provided: tuple[str, ...]) -> nn.Module:
    cls = tuned_class(base, provided)
    return cls.__new__(cls)


def swap_provided(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let properties answer for parameters that a provider now holds."""
    base = type(module)._burnish_base
    module.__class__ = tuned_class(base, names)


def unswap(module: nn.Module) -> None:
    """Give a module its own class back and drop its slot."""
    module.__class__ = type(module)._burnish_base
    del module._modules[ATTR]


def unprovide(module: nn.Module, param: str, value: Tensor) -> None:
    """Give a module its parameter back from a provider."""
    slot = module._modules[ATTR]
    base = type(module)._burnish_base
    module.__class__ = tuned_class(base, tuple(slot.providers))
    module._parameters[param] = nn.Parameter(value, requires_grad=False)
