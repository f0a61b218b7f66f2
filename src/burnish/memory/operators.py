"""What the ledger asks of an operator: its tensors, whether it makes new ones, what it costs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as _is_wrapper
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten

# the CPU's fused attention is not in torch's own table
FLOPS = dict(flop_registry)
if (_onednn := getattr(torch.ops.mkldnn, "_linear_pointwise", None)) is not None:
    FLOPS[_onednn] = lambda x, w, *a, out_val=None, **kw: 2 * x.numel() * w.shape[0]
FLOPS.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu,
    lambda q, k, v, *a, out_val=None, **kw: sdpa_flop_count(q.shape, k.shape, v.shape),
)
FLOPS.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    lambda g, q, k, v, *a, out_val=None, **kw: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape),
)



@cache
def aliases(func: Any) -> bool:
    """Does the operator return (a view of) one of its arguments?"""
    return any(r.alias_info is not None for r in func._schema.returns)


@cache
def mutates(func: Any) -> bool:
    """Does the operator write to one of its arguments?"""
    return bool(func._schema.is_mutable)


def cost(func: Any, args: tuple, kwargs: dict[str, Any], out: Any
         ) -> tuple[float, int, int, str, bool]:
    """(operations, bytes moved, bytes of an element, device type, does it cross devices?)."""
    formula = FLOPS.get(func.overloadpacket)
    operations = formula(*args, **kwargs, out_val=out) if formula is not None else 0
    moved, where, itemsize, crosses = 0, "", 4, False
    for part in (args, out):
        for t in leaves(part):
            moved += t.numel() * t.element_size()
            crosses = crosses or where not in ("", t.device.type)
            where, itemsize = t.device.type, t.element_size()
    return operations, moved, itemsize, where or "cpu", crosses


def called_by_engine() -> bool:
    """Is the operator being dispatched the engine's own, not one of a Python backward?"""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_name in ("_fn", "inner"):
        frame = frame.f_back                  # wrappers that older versions put around modes
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def leaves(value: Any) -> Iterator[Tensor]:
    """Plain tensors in nested containers; wrapper subclasses give the tensors they hold."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor and _is_wrapper(value):
            for name in value.__tensor_flatten__()[0]:
                yield from leaves(getattr(value, name))
        elif value.layout is torch.strided:
            yield value
        else:
            yield from _sparse_parts(value)
    elif isinstance(value, (list, tuple, set)):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from leaves(v)


def _sparse_parts(t: Tensor) -> Iterator[Tensor]:
    if t.layout is torch.sparse_coo:
        yield from (t._indices(), t._values())
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (t.crow_indices(), t.col_indices(), t.values())
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (t.ccol_indices(), t.row_indices(), t.values())
