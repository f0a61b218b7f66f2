"""What a block that runs again need not compute: its last product.

Backward needs what operations keep, not what they give. In a pre-norm block the last linear's
result is added to the stream, and nothing after it keeps anything: a run that only serves
backward may leave that product out: 22 (Llama) to 33 % (ViT) of the block's matrix work. Its result
is then filled with NaN, which nobody reads.

Whether it is so is looked at, not assumed. A block's first run in backward is whole, and the tape
watches what is kept behind the last product; only where nothing was (weights apart) do later runs
leave it out. They are watched as well: where something is kept behind it after all, or the run
fails, the block runs again, whole, and stays so.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import matmul
from .cast import casting
from .functions import applied, shaped
from .roles import is_weight


class Run:
    """One run of a block, counting its linear products.

    last: how many there are (0 while they are counted).  leave: the last one is left out.
    """

    def __init__(self, last: int = 0, leave: bool = False):
        self.last, self.leave = last, leave
        self.products, self.depth = 0, 0
        self.watched, self.behind, self.read = False, False, False

    @property
    def unread(self) -> bool:
        """Has it been seen that nothing behind the last product is kept?"""
        return self.watched and self.behind and not self.read


class _Here(threading.local):
    run: Run | None = None


_here = _Here()

#: block -> may its last product be left out? Known after its first run in backward.
_learnt: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@contextmanager
def running(run: Run) -> Iterator[Run]:
    """Inside, products and kept tensors of this thread are those of `run`."""
    was, _here.run = _here.run, run
    try:
        yield run
    finally:
        _here.run = was


def repeated(block: nn.Module, products: int, run: Callable[[], Any]) -> Any:
    """``run()``, the block's second run, without the last of its products where nobody reads it.
    Whole where somebody looks on (forward hooks)."""
    looked_at = torch.nn.modules.module._global_forward_hooks or \
        any(m._forward_hooks for m in block.modules())
    plan = Run(products, bool(products) and _learnt.get(block, False) and not looked_at)
    try:
        with running(plan):
            out = run()
    except Exception:
        if not plan.leave:
            raise
        plan.read = True
    _learnt[block] = plan.unread and _learnt.get(block, True)
    return run() if plan.leave and plan.read else out


# -- told by the tape and by the products ---------------------------------------------------------
def watch() -> None:
    """The tape sees from now on whatever this thread's run keeps."""
    if _here.run is not None:
        _here.run.watched = True


def kept(t: Tensor) -> None:
    """A tensor is kept for backward."""
    run = _here.run
    if run is not None and run.behind and not run.read and not is_weight(t):
        run.read = True


def first_in_backward() -> bool:
    """Is what is being kept the input of a product that is left out? Its backward comes first of
    all, so the input itself is kept: made again it would be there just as early."""
    run = _here.run
    return run is not None and run.leave and run.watched and run.depth == 1 \
        and run.products == run.last


def begin() -> bool:
    """A linear product begins: may its result be left out? Products inside it are its own affair,
    until :func:`end`."""
    run = _here.run
    if run is None:
        return False
    run.depth += 1
    if run.depth > 1:
        return False
    run.products += 1
    if run.behind:                                   # more than were counted: that was not the last
        run.read = True
    return run.leave and run.watched and run.products == run.last


def end() -> None:
    """What the product itself keeps is kept by now."""
    run = _here.run
    if run is None:
        return
    run.depth -= 1
    if not run.depth and run.products == run.last:
        run.behind = True


def nothing(x: Tensor, out: int) -> Tensor:
    """What stands for a result that nobody reads: (..., out) of NaN."""
    return x.new_full((*x.shape[:-1], out), float("nan"))


def linear(func: Any, args: tuple, kwargs: dict, stock: bool = False) -> Tensor:
    """``F.linear`` of a module that nothing was added to: left out where it may be, else by the
    library that is quickest at it. stock: let torch's own function save what is saved."""
    x, weight, bias = _bound(*args, **kwargs)
    left = begin()
    if left and type(x) is Tensor and casting(x) is None or not stock and _quick(x, weight):
        out: Tensor = applied(_Linear, x, weight, bias, left)
    else:
        out = func(*args, **kwargs)
    end()
    return out


def addmm(func: Any, args: tuple, stock: bool) -> Tensor:
    """``b + x W`` of a layer that holds its weight the other way (transformers' Conv1D)."""
    bias, x, weight = args
    if stock or bias.dim() != 1 or not _quick(x, weight.t()):
        return cast("Tensor", func(*args))
    return cast("Tensor", applied(_Linear, x, weight.t(), bias, False))


def _quick(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and matmul.served(x, weight) and casting(x) is None


def again(func: Any) -> Any:
    """What makes the result of :func:`linear` another time."""

    def product(*args: Any, **kwargs: Any) -> Tensor:
        x, weight, bias = _bound(*args, **kwargs)
        if matmul.served(x, weight) and casting(x) is None:
            return _product(x, weight, bias)
        out: Tensor = func(*args, **kwargs)
        return out

    return product


def _bound(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return input, weight, bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = matmul.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return shaped(y, (*x.shape[:-1], weight.shape[0]))


class _Linear(torch.autograd.Function):
    """``x W^T + b``, or its backward alone with no result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: bool) -> Tensor:
        need_x, need_w, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_w else None, weight if need_x else None)
        return nothing(x, weight.shape[0]) if left else _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g2, dx, dW = g.reshape(-1, g.shape[-1]), None, None
        if torch.is_grad_enabled():                  # it is itself differentiated
            dx = None if weight is None else g @ weight
            dW = None if x is None else g2.t() @ x.reshape(-1, x.shape[-1])
        else:
            if weight is not None:
                dx = shaped(matmul.mm(g2, weight), (*g.shape[:-1], weight.shape[1]))
            if x is not None:
                dW = matmul.tn(g2, x.reshape(-1, x.shape[-1]))
        return dx, dW, g2.sum(0) if ctx.needs_input_grad[2] else None, None
