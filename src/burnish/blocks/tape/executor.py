"""How a block runs: stored, recomputed in backward, or without a graph at all.

`checkpoint` keeps a block's inputs and runs the block again in backward, under the lean tape, so
the one live block is lean too. Trainable tensors are explicit inputs of the function: gradients
arrive whether or not the block's hidden state carries one, so frozen embeddings need no magic
call, and a block in which nothing needs a gradient simply runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as stock

from .functions import transformed
from .rerun import Run, Stretch, stretch_of
from .selective import Answers

if TYPE_CHECKING:
    from .saved import Tape

def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") or type(value).__name__.endswith("Cache")


def _uncached(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A key-value cache would be filled twice; training does not use it."""
    args = tuple(None if _is_cache(a) else a for a in args)
    kwargs = {k: None if _is_cache(v) else v for k, v in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    return args, kwargs


def trained(module: nn.Module) -> list[Tensor]:
    """What a block reads and trains: its own parameters, and those its terms borrow."""
    found = [*module.parameters(),
             *(p for m in module.modules() for p in getattr(m, "borrowed", ()))]
    return [p for p in {id(p): p for p in found}.values() if p.requires_grad]


def checkpoint(module: nn.Module, fn: Callable[..., Any], args: tuple, kwargs: dict,
               tape: Tape | None = None, joins: bool = False, selective: bool = False) -> Any:
    """Run ``fn(*args, **kwargs)``, the forward of `module`, keeping only its inputs.

    tape: the second run goes under it. joins: what an earlier block of this forward has made, up to
    the last one that did not join, is not kept either (rerun.py). selective: costly results are
    kept besides (selective.py). Inside somebody else's checkpointing, who runs blocks again one by
    one, it is neither.
    """
    params = trained(module)
    given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    if not torch.is_grad_enabled() or not (params or any(t.requires_grad for t in given)):
        return fn(*args, **kwargs)
    if transformed():                             # torch.func sees every operation, once
        return fn(*args, **kwargs)
    args, kwargs = _uncached(args, kwargs)
    if tape is None:
        return Run(module, fn, args, kwargs, Stretch()).apply(params)
    alone = tape.others()
    stretch = stretch_of(joins and not alone, given)
    answers = Answers() if selective and not alone else None
    return Run(module, fn, args, kwargs, stretch, tape.recording, answers).apply(params)


def in_graph(fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """:func:`checkpoint` for a graph that is compiled: stock, on a flat list of tensors."""
    leaves, spec = pytree.tree_flatten(_uncached(args, kwargs))
    where = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]

    def run(*tensors: Tensor) -> Any:
        held = list(leaves)
        for i, t in zip(where, tensors, strict=True):
            held[i] = t
        a, k = pytree.tree_unflatten(held, spec)
        return fn(*a, **k)

    return stock(run, *[leaves[i] for i in where], use_reentrant=False)


def no_grad(module: nn.Module, fn: Callable[..., Any], args: tuple, kwargs: dict,
            tape: Tape | None = None) -> Any:
    """Run a block without a graph (side networks read it from outside)."""
    with torch.no_grad():
        return fn(*args, **kwargs)


#: how a block may run, by the name that a slot holds
MODES: dict[str, Callable[..., Any]] = {
    "checkpoint": checkpoint, "joined checkpoint": functools.partial(checkpoint, joins=True),
    "selective checkpoint": functools.partial(checkpoint, selective=True),
    "no_grad": no_grad}
