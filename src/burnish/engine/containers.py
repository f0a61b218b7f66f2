"""Containers whose children are data: their slot is not one of them.

`nn.Sequential`, `nn.ModuleList` and `nn.ModuleDict` run, count and hand out whatever is registered
in them. A swapped container leaves its own slot out of that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn

#: the name of a module's slot, as in slot.py
ATTR = "burnish"


def members(base: type) -> dict[str, Any]:
    """What a swapped class overrides so that iteration, length and slices are the base's."""
    if issubclass(base, nn.ModuleDict):
        return {"__iter__": lambda self: iter(_own(self)), "__len__": lambda self: len(_own(self)),
                "__contains__": lambda self, key: key in _own(self),
                "keys": lambda self: _own(self).keys(), "items": lambda self: _own(self).items(),
                "values": lambda self: _own(self).values()}
    if issubclass(base, nn.Sequential | nn.ModuleList):
        return {"__iter__": _iterate, "__len__": lambda self: len(_own(self)),
                "__getitem__": _item(base)}
    return {}


def _own(module: nn.Module) -> dict[str, nn.Module | None]:
    return {name: child for name, child in module._modules.items() if name != ATTR}


def _iterate(self: nn.Module) -> Iterator[Any]:
    return iter(_own(self).values())


def _item(base: Any) -> Any:
    def item(self: nn.Module, index: Any) -> Any:
        if not isinstance(index, slice):
            return base.__getitem__(self, index)
        if issubclass(base, nn.ModuleList):
            return base(list(_own(self).values())[index])
        return base(OrderedDict(list(_own(self).items())[index]))

    return item
