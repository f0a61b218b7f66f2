"""Which road a computation takes: torch's operators, or kernels written in Triton.

Three computations have both, and all three ask here, at each call:

    products with a frozen weight that is held in another form      coded.py
    the kernel delta: threshold, panels and what flows back         distances.py
    single entries of a product of gradient and input               entries.py

Torch's operators run, until ``BURNISH_KERNELS=triton`` in the environment, or :func:`use`, asks for
Triton's kernels: they have been checked in its interpreter, not yet on a GPU. They run on CUDA, and
on a CPU in the interpreter (``TRITON_INTERPRET=1``); a machine that cannot run them is refused.
:func:`refusal` says why a road is not taken, so whoever wants to know is told
(``tuned.summary()``, ``burnish doctor``).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, nearest
from ...core.followed import compiling
from ..tape.functions import transformed

VARIABLE, ROADS = "BURNISH_KERNELS", ("torch", "triton")
#: what the kernels read and write; they compute in fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: the least that Triton compiles for
CAPABILITY = (8, 0)
_PLAIN = (Tensor, nn.Parameter)
_asked: list[str] = []


@contextmanager
def use(road: str) -> Iterator[None]:
    """"torch" or "triton" for all threads while this lasts."""
    _asked.append(_known(road, "use"))
    try:
        yield
    finally:
        _asked.pop()


def asked() -> str:
    """What was asked for: by :func:`use`, else by the environment, else "torch"."""
    return _asked[-1] if _asked else _known(os.environ.get(VARIABLE) or "torch", VARIABLE)


def _known(road: str, where: str) -> str:
    if road not in ROADS:
        raise ConfigError(f"{where}: {road!r} is no road; expected one of {', '.join(ROADS)}"
                          f"{nearest(road, ROADS)}")
    return road


def refusal(like: Tensor, *more: Tensor) -> str:
    """Why torch's operators run on these tensors; "" where Triton's kernels do.

    like: a tensor of the precision that is computed for. ConfigError where Triton was asked for by
    name and this machine cannot run it.
    """
    kind = like.device.type
    if kind not in ("cuda", "cpu") or kind == "cpu" and asked() == "torch":
        return f"on {kind}, and Triton's kernels are for cuda"
    if asked() == "torch":
        return f"{VARIABLE}=triton was not asked for"
    if compiling():
        return "inside a compiled graph"
    for t in (like, *more):
        if type(t) not in _PLAIN:
            return f"a {type(t).__name__} is no plain tensor"
    if like.dtype not in DTYPES:
        return f"in {str(like.dtype).partition('.')[2]}, and Triton's kernels compute in float32"
    if transformed():
        return "under a transform"
    why = missing(kind, like.device.index)
    if why:
        raise ConfigError(f"Triton's kernels were asked for, but {why}")
    return why


@lru_cache(maxsize=64)
def missing(kind: str, index: int | None) -> str:
    """What a device lacks to run them; "" where it lacks nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return ""
    if kind == "cpu":
        return "on a CPU only its interpreter runs: set TRITON_INTERPRET=1 before Python starts"
    if torch.version.hip is not None:
        return "they were never run on ROCm"
    have = torch.cuda.get_device_capability(index)
    return "" if have >= CAPABILITY else \
        f"{torch.cuda.get_device_name(index)} has capability {have[0]}.{have[1]}, and Triton " \
        f"compiles for {CAPABILITY[0]}.{CAPABILITY[1]} and newer"


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Do kernels run in Triton's interpreter in this process?"""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "yes", "y")


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Run so many programs of a kernel on the device of its first argument.

    Products are rounded by themselves (no contraction into the additions behind them): what two
    kernels compute of the same numbers has the same bits, and so has what torch's operators do.
    """
    if programs < 1:
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, enable_fp_fusion=False, **meta)


def blocks(n: int, most: int, least: int = 16) -> int:
    """The power of two from `least` to `most` that n fits into, or the largest."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))
