"""What a kept tensor is for, told while the operation that keeps it runs.

A tensor that is the input of a linear enters its backward linearly (``dW = g^T x``), so a random
code of it that is right in the mean leaves the gradient right in the mean. The same tensor kept by
a softmax does not. So the role is of the *reading*, not of the tensor:

weight         a parameter, or what stands for one: somebody holds it anyway
linear input   what a weight multiplies: enters the gradient of that weight, and nothing else,
               linearly
factor         enters backward linearly as well: inputs of convolutions, states that are multiplied
               with each other (whose gradients go on to what is below)
None           anything else: it is wanted as it is

Norms and activations have a role of their own and never come here: their functions keep a code
instead of a tensor (coded.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from .functions import storage_of

Role = Literal["weight", "linear input", "factor"]
#: roles for which a code that is right in the mean will do
IN_THE_MEAN = frozenset({"linear input", "factor"})

#: functions whose first argument is the input and whose second is the weight
_LAYERS = frozenset({"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
                     "conv_transpose2d", "conv_transpose3d"})
#: functions that are linear in each of their tensors
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm",
                       "mul", "__mul__", "__rmul__", "multiply"})
#: noted operations through which the role of the reader reaches the arguments
LINEAR = frozenset({"mul", "__mul__", "__rmul__", "multiply", "to", "float", "type_as",
                    "_to_copy"})


class _Here(threading.local):
    reading: tuple[Sequence[Tensor], Sequence[Tensor], Role, bool] | None = None     # see `reading`


_here = _Here()


@contextmanager
def reading(inputs: Sequence[Tensor], weights: Sequence[Tensor] = (), role: Role = "linear input",
            copies: bool = False) -> Iterator[None]:
    """Of what is kept inside, `inputs` have this role. copies: so have tensors of as many numbers
    as one of them and none of `weights`: what an operation has cast or laid out anew."""
    was, _here.reading = _here.reading, (inputs, weights, role, copies)
    try:
        yield
    finally:
        _here.reading = was


def of_function(name: str, args: tuple, kwargs: dict
                ) -> tuple[list[Tensor], list[Tensor], Role] | None:
    """(inputs, weights, role of the inputs) of a call of a torch function; None where it says
    nothing."""
    if name in _LAYERS:
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        return [given["input"]], [given["weight"]], "linear input" if name == "linear" else "factor"
    if name not in _PRODUCTS:
        return None
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    weights = [t for t in tensors if is_weight(t)]
    inputs = [t for t in tensors if t.requires_grad and not is_weight(t)]
    # a tensor times itself enters twice, and a code is not independent of itself
    twice = len({storage_of(t) for t in inputs}) < len(inputs)
    return ([], weights, "factor") if twice else \
        (inputs, weights, "linear input" if len(inputs) == 1 and weights else "factor")


def is_weight(t: Tensor) -> bool:
    """Is it, or is it a view of, a parameter?"""
    return isinstance(t._base if t._is_view() else t, nn.Parameter)


def role_of(t: Tensor) -> Role | None:
    """The role of a tensor that is being kept just now. In doubt it is wanted as it is."""
    if is_weight(t):
        return "weight"
    if _here.reading is None:
        return None
    inputs, weights, role, copies = _here.reading
    mine = storage_of(t)
    if mine is None or any(storage_of(w) == mine for w in weights):
        return "weight"
    if any(storage_of(x) == mine for x in inputs):
        return role
    if not copies:
        return None
    if any(w.numel() == t.numel() for w in weights):
        return "weight"
    return role if any(x.numel() == t.numel() for x in inputs) else None


def name_of(func: Any) -> str:
    """The name torch gives a function; operators are called ``add_.Tensor``."""
    return getattr(func, "__name__", "").split(".")[0]
