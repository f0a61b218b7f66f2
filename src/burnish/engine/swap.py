"""The class swap: a touched module becomes a subclass of its own class, under the same name.

``isinstance`` holds, no parameter is renamed or moved, and the way back is one assignment.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..core.call import answer
from .containers import members

#: the one child a touched module gets
ATTR = "burnish"
#: what the names of its storages begin with
PROVIDED = "provided_"

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
                "_burnish_base": base, "_burnish_shown": provided, **members(base)}
        for name in provided:
            body[name] = property(functools.partial(_shown, name=name),
                                  functools.partial(_set, name=name),
                                  functools.partial(_del, name=name))
        _CLASSES[key] = type(base.__name__, (base,), body)
    return _CLASSES[key]


def _shown(module: nn.Module, name: str) -> Any:
    """``module.<name>``: what stands for it in this thread, what a provider holds, or its own."""
    value = answer(module, name)
    if value is not None:
        return value
    slot = module._modules.get(ATTR)
    if slot is not None and name in slot.providers:
        return slot._stored(module, name)
    for own in (module.__dict__, module._parameters, module._buffers):
        if name in own:
            return own[name]
    below = getattr(type(module)._burnish_base, name, None)      # the base computes it
    if isinstance(below, property):
        return below.fget(module)
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")


def _set(module: nn.Module, value: Any, name: str) -> None:
    """Plain attributes only: nn.Module has taken parameters and buffers before."""
    below = getattr(type(module)._burnish_base, name, None)
    if isinstance(below, property):
        below.fset(module, value)
    else:
        module.__dict__[name] = value


def _del(module: nn.Module, name: str) -> None:
    del module.__dict__[name]


def expose(module: nn.Module, name: str) -> None:
    """Let a property answer for a parameter from now on, so that each thread may see its own."""
    cls = type(module)
    shown = getattr(cls, "_burnish_shown", ())
    if name not in shown:
        base = getattr(cls, "_burnish_base", cls)
        module.__class__ = tuned_class(base, (*shown, name))


def _rebuild(base: type, provided: tuple[str, ...]) -> nn.Module:
    cls = tuned_class(base, provided)
    return cls.__new__(cls)


def swap_provided(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let properties answer for parameters that a provider now holds."""
    for name in names:
        expose(module, name)


def unswap(module: nn.Module) -> None:
    """Give a module its own class back and drop its slot; likewise what shows below it."""
    module._modules.pop(ATTR, None)
    for m in module.modules():
        if hasattr(type(m), "_burnish_base") and ATTR not in m._modules:
            m.__class__ = type(m)._burnish_base


def set_aside(module: nn.Module, param: str) -> None:
    """A provider answers for a parameter from now on. The Parameter itself waits empty in the slot
    (whoever holds it, an optimizer or a tie, finds it again), its place in the order stays."""
    slot = module._modules[ATTR]
    slot.shells[param] = module._parameters[param]
    module._parameters[param] = None


@torch.no_grad()
def refill(shell: nn.Parameter, value: Tensor) -> nn.Parameter:
    """The Parameter with its values again; a new one where torch cannot put them into the old."""
    try:
        shell.data = value
    except (RuntimeError, TypeError):            # another kind of tensor than it was (fake, say)
        return nn.Parameter(value, requires_grad=shell.requires_grad)
    return shell


def unprovide(module: nn.Module, param: str, value: Tensor) -> None:
    """Give a module its parameter back from a provider."""
    slot = module._modules[ATTR]
    shell = slot.shells.get(param)
    module._parameters[param] = nn.Parameter(value, requires_grad=False) if shell is None else \
        refill(shell, value)
    slot.shells.pop(param, None)
    slot.stacks.pop(param, None)
    if (name := slot.providers.pop(param, None)) is not None:
        slot._modules.pop(name, None)


def provider_of(key: str) -> tuple[str, str] | None:
    """(path, parameter) of the weight whose storage has chosen what this entry of a state dict says
    (blocks/weight/pruned.py); None of any other entry."""
    path, own, child = f".{key}".rpartition(f".{ATTR}.{PROVIDED}")
    leaf = child.removesuffix("._extra_state")
    return (path.removeprefix("."), leaf) if own and leaf != child else None
