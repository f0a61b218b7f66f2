"""How a block runs: stored, recomputed in backward, or without a graph at all.

`checkpoint` keeps a block's inputs and runs the block again in backward, under the lean tape, so
the one live block is lean too. Trainable tensors are explicit inputs of the function: gradients
arrive whether or not the block's hidden state carries one, so frozen embeddings need no magic
call, and a block in which nothing needs a gradient simply runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as stock

from ...core.call import again, current
from . import replay
from .functions import transformed, unviewed, version_of

_TENSOR = object()


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") or type(value).__name__.endswith("Cache")


def _uncached(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A key-value cache would be filled twice; training does not use it."""
    args = tuple(None if _is_cache(a) else a for a in args)
    kwargs = {k: None if _is_cache(v) else v for k, v in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    return args, kwargs


class _Again(torch.autograd.Function):
    """Outputs of run(leaves), recomputed in backward from the kept leaves."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Any:
        ctx.call = call
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        ctx.devices = [torch.device("cpu"), *{t.device: None for t in tensors}]
        ctx.rng = replay.rng_state(ctx.devices)
        ctx.autocast = replay.autocast_state(device)
        n = call.n_inputs
        versions = [version_of(t) for t in tensors[:n]]
        with again(call.context):
            out = call.run(tensors[:n])
        if versions != [version_of(t) for t in tensors[:n]]:
            raise RuntimeError("a checkpointed block changes its input in place, so backward could "
                               "not run it again from it; clone the input in the block, or leave "
                               "checkpoint out of the recipe")
        ctx.save_for_backward(*tensors[:n])
        ctx.params = tensors[n:]
        leaves, call.out_spec = pytree.tree_flatten(out)
        call.out_leaves = [_TENSOR if isinstance(v, Tensor) else v for v in leaves]
        made = unviewed([v for v in leaves if isinstance(v, Tensor)], tensors)
        ctx.mark_non_differentiable(*[v for v in made if not v.is_floating_point()])
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        call, n = ctx.call, ctx.call.n_inputs
        inputs = []
        for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1 : 1 + n], strict=True):
            inputs.append(t.detach().requires_grad_(need))
        with again(call.context), torch.enable_grad(), replay.replay(ctx.devices, ctx.rng), \
                replay.autocast(ctx.autocast, cache=True), call.recording():
            out = call.run(inputs)
        made = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
        del out
        pairs = [(v, g) for v, g in zip(made, grads, strict=True)
                 if v.requires_grad and g is not None]
        del made
        wanted = [t for t in (*inputs, *ctx.params) if t.requires_grad]
        if not pairs or not wanted:
            return (None,) * (1 + n + len(ctx.params))
        outs, gouts = zip(*pairs, strict=True)
        del pairs
        got = iter(torch.autograd.grad(outs, wanted, gouts, allow_unused=True))
        return None, *[next(got) if t.requires_grad else None for t in (*inputs, *ctx.params)]


class _Call:
    """One call of a block: which leaves are tensors, and how to run it on other tensors."""

    def __init__(self, fn: Callable[..., Any], args: tuple, kwargs: dict, recording: Any):
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.where = [i for i, v in enumerate(self.leaves) if isinstance(v, Tensor)]
        self.tensors = [self.leaves[i] for i in self.where]
        for i in self.where:
            self.leaves[i] = None                 # the function keeps them, not this object
        self.n_inputs, self.fn, self.recording = len(self.where), fn, recording
        self.context = current()                  # backward runs it again in this call
        self.out_spec: Any = None
        self.out_leaves: list[Any] = []

    def run(self, tensors: Any) -> Any:
        leaves = list(self.leaves)
        for i, t in zip(self.where, tensors, strict=True):
            leaves[i] = t
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.fn(*args, **kwargs)

    def result(self, made: tuple[Tensor, ...]) -> Any:
        it = iter(made)
        leaves = [next(it) if v is _TENSOR else v for v in self.out_leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)


def trained(module: nn.Module) -> list[Tensor]:
    """What a block reads and trains: its own parameters, and those its terms borrow."""
    found = [*module.parameters(),
             *(p for m in module.modules() for p in getattr(m, "borrowed", ()))]
    return [p for p in {id(p): p for p in found}.values() if p.requires_grad]


def checkpoint(module: nn.Module, fn: Callable[..., Any], args: tuple, kwargs: dict,
               recording: Callable[[], Any] = nullcontext) -> Any:
    """Run ``fn(*args, **kwargs)``, the forward of `module`, keeping only its inputs."""
    params = trained(module)
    floating = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    if not torch.is_grad_enabled() or not (params or any(t.requires_grad for t in floating)):
        return fn(*args, **kwargs)
    if transformed():                             # torch.func sees every operation, once
        return fn(*args, **kwargs)
    args, kwargs = _uncached(args, kwargs)
    call = _Call(fn, args, kwargs, recording)
    tensors, call.tensors = call.tensors, []
    made = _Again.apply(call, *tensors, *params)
    return call.result(made)


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
            recording: Callable[[], Any] = nullcontext) -> Any:
    """Run a block without a graph (side networks read it from outside)."""
    with torch.no_grad():
        return fn(*args, **kwargs)


MODES: dict[str, Callable[..., Any]] = {"checkpoint": checkpoint, "no_grad": no_grad}
