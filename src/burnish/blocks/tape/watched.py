"""What a tape knows of functions: whose outputs are cheap to make again, and what they change.

A function that writes into memory is known by how torch names it: a trailing underscore, an
augmented assignment, an assignment by index, ``out=``, ``inplace=True``. What hands memory out to
code torch does not see (numpy, DLPack) counts as a change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


def always(out: Tensor, args: tuple) -> bool:
    return True


def _widening(out: Tensor, args: tuple) -> bool:
    """A cast is worth a note only when the input is no larger than the output."""
    return bool(args) and isinstance(args[0], Tensor) \
        and args[0].element_size() <= out.element_size()


#: whose backward keeps its input
NORMS = ("layer_norm", "rms_norm", "group_norm")
ACTIVATIONS = ("gelu", "silu", "mish", "hardswish", "softplus", "leaky_relu", "elu", "selu", "pow",
               "square")
PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply", "addcmul")
#: name of a function -> may its output be made again? (output, arguments) -> bool
CHEAP: dict[str, Callable[[Tensor, tuple], bool]] = {
    **dict.fromkeys((*NORMS, *ACTIVATIONS), always),
    # products keep both factors as soon as both carry gradients; else a note costs no more
    **dict.fromkeys((*PRODUCTS, "turned"), always),      # (turned: blocks/state/planes.py)
    **dict.fromkeys(("to", "float", "type_as", "_to_copy"), _widening),
}



def in_rows(args: tuple) -> tuple:
    """The arguments of a group norm, its input contiguous where torch's kernel on the CPU would end
    the process: scale or shift train, the input asks for no gradient and lies channels last."""
    x, affine = args[0], [t for t in args[2:4] if isinstance(t, Tensor)]
    alone = not x.requires_grad and any(t.requires_grad for t in affine)
    return (x.contiguous(), *args[1:]) if alone and x.device.type == "cpu" else args


_ASSIGNMENTS = {"__setitem__", *(f"__i{n}__" for n in (
    "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
    "lshift", "rshift", "matmul"))}
_HANDED_OUT = {"numpy", "__array__", "__dlpack__", "to_dlpack"}
_HARMLESS = {"requires_grad_", "detach_", "share_memory_"}


class Watched:
    """What is known of one function. cheap: None, "dropout" or a condition (see CHEAP).

    read: it reads a property of a tensor. idle: without keywords, no tape has anything to do."""

    __slots__ = ("cheap", "changes_first", "switch", "may_change", "read", "idle")

    def __init__(self, func: Any):
        name = getattr(func, "__name__", "").split(".")[0]        # operators: add_.Tensor
        self.cheap: Any = "dropout" if func is F.dropout else CHEAP.get(name)
        self.changes_first = name in _ASSIGNMENTS or name in _HANDED_OUT or (
            name.endswith("_") and not name.startswith("__") and name not in _HARMLESS)
        self.switch = _position(func)
        self.may_change = self.changes_first or self.switch is not None
        self.read = name == "__get__"
        self.idle = self.cheap is None and not self.may_change \
            and func not in (F.linear, F.relu, F.group_norm, torch.addmm)

    def changes(self, args: tuple, kwargs: dict) -> list[Any]:
        """The tensors this call writes into."""
        changed = []
        if self.changes_first:
            changed.append(args[0] if args else next(iter(kwargs.values()), None))
        elif self.switch is not None and (
                kwargs.get("inplace") or (len(args) > self.switch and args[self.switch])):
            changed.append(args[0] if args else kwargs.get("input"))
        if kwargs and kwargs.get("out") is not None:
            changed.append(kwargs["out"])
        return [t for t in pytree.tree_leaves(changed) if isinstance(t, Tensor)] \
            if changed else changed


def _position(func: Any) -> int | None:
    """Where a Python function takes `inplace`."""
    if not inspect.isfunction(func):
        return None
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
