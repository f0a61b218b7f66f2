"""One run of a block that backward repeats, and runs of several blocks that are repeated as one.

A block keeps the tensors it is given and runs again from them in backward. A block that *joins* the
one before it keeps nothing that an earlier block of the same stretch has made: backward makes that
again from the inputs of the first. The model's own loop stands between the blocks (0019), so what
was made is known by being the very tensor, unchanged; anything else a block is given is kept.

    forward   x -> block 0 -> h1 -> block 1 -> h2 -> block 2 -> h3       kept: x
    backward  of block 2 comes first: 0, 1 and 2 run again, each with a graph of its own; every
              block's backward then takes its graph and lets it go

Each block is a function of its own to autograd, with its trainable tensors among the inputs. What a
backward has made again and did not use (it never reached a block) goes when that backward ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils import _pytree as pytree

from ...core.call import again, current
from . import replay, unread
from .functions import once_differentiable, unviewed, version_of
from .selective import Answers

_TENSOR = object()
#: under which a call knows the stretch that blocks may join
_KEY = "the blocks that run again together"
#: (block, output) of a stretch: which tensor it made
Made = tuple[int, int]


class Stretch:
    """Blocks that run again together, in one forward."""

    def __init__(self) -> None:
        self.size = 0
        self.top: Any = lambda: None             # weak reference to the function of the last block
        self.made: dict[int, tuple[Any, int, Made]] = {}      # id -> (tensor, version, which)
        self.again: dict[int, tuple[list[Tensor], list[Tensor]]] = {}   # block -> (inputs, outputs)

    def source(self, t: Tensor) -> Made | None:
        """Which block made this very tensor; None where none did, or it has changed since."""
        ref, version, which = self.made.get(id(t), (lambda: None, 0, (0, 0)))
        return which if ref() is t and version_of(t) == version else None

    def add(self, index: int, made: Sequence[Tensor]) -> None:
        for k, t in enumerate(made):
            self.made[id(t)] = weakref.ref(t), version_of(t), (index, k)

    def take(self, ctx: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs of a block, made again with the graph between them."""
        index = ctx.run.index
        if index not in self.again:
            self._repeat(ctx)
            if index:                            # what this backward does not reach goes with it
                me = weakref.ref(self)
                Variable._execution_engine.queue_callback(lambda: _clear(me()))
        return self.again.pop(index)

    def _repeat(self, last: Any) -> None:
        chain = [last]
        while chain[-1].run.below is not None:
            chain.append(chain[-1].run.below)
        for ctx in reversed(chain):
            self.again[ctx.run.index] = ctx.run.repeat(ctx, self.again, ctx is last)


def _clear(stretch: Stretch | None) -> None:
    if stretch is not None:
        stretch.again.clear()


def stretch_of(joins: bool, given: Sequence[Tensor]) -> Stretch:
    """The stretch of a block that is about to run: the one under way, if the block joins that and
    is given something it has made; else one of its own, which is under way from now on."""
    call = current()
    if call is None:
        return Stretch()
    here = call.box.get(_KEY) if joins else None
    if here is None or here.top() is None or not any(here.source(t) for t in given):
        here = call.box[_KEY] = Stretch()
    return here


class Run:
    """One call of a block: which leaves are tensors, and how to run it on other tensors.

    recording: the tape its second run goes under. answers: where it keeps costly results too.
    """

    def __init__(self, block: nn.Module, fn: Callable[..., Any], args: tuple, kwargs: dict,
                 stretch: Stretch, recording: Callable[[], Any] = nullcontext,
                 answers: Answers | None = None):
        self.block, self.products = block, 0
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.where = [i for i, v in enumerate(self.leaves) if isinstance(v, Tensor)]
        self.tensors = [self.leaves[i] for i in self.where]
        for i in self.where:
            self.leaves[i] = None                 # the function keeps them, not this object
        self.sources = [stretch.source(t) for t in self.tensors]
        self.stretch, self.index, self.below = stretch, stretch.size, stretch.top()
        self.fn, self.recording, self.answers = fn, recording, answers
        self.context = current()                  # backward runs it again in this call
        self.modes: list[bool] = []
        self.out_spec: Any = None
        self.out_leaves: list[Any] = []

    def apply(self, params: Sequence[Tensor]) -> Any:
        tensors, self.tensors = self.tensors, []
        made = _Again.apply(self, *tensors, *params)
        self.stretch.add(self.index, made)
        it = iter(made)
        leaves = [next(it) if v is _TENSOR else v for v in self.out_leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def on(self, tensors: Sequence[Tensor]) -> Any:
        """The block, run on these tensors."""
        leaves = list(self.leaves)
        for i, t in zip(self.where, tensors, strict=True):
            leaves[i] = t
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.fn(*args, **kwargs)

    def repeat(self, ctx: Any, again_made: dict[int, tuple[list[Tensor], list[Tensor]]],
               last: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(inputs, outputs) of the second run, with a graph between them. The last block of a
        stretch need not make what nobody reads (unread.py)."""
        kept, inputs = iter(ctx.saved_tensors), []
        for source, need in zip(self.sources, ctx.needs_input_grad[1:], strict=False):
            t = next(kept) if source is None else again_made[source[0]][1][source[1]]
            inputs.append(t.detach().requires_grad_(need))

        def run() -> Any:
            random = nullcontext() if ctx.rng is None else replay.replay(ctx.devices, ctx.rng)
            answered = nullcontext() if self.answers is None else \
                self.answers.second(inputs, list(kept))
            with again(self.context), torch.enable_grad(), random, self._as_it_was(), \
                    replay.autocast(ctx.autocast, cache=True), self.recording(), answered:
                return self.on(inputs)

        whole = self.answers is not None or not last
        out = run() if whole else unread.repeated(self.block, self.products, run)
        return inputs, [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Inside, the block's modules train or evaluate as they did in the first run: a mode may
        hold for the forward only, or be changed before backward."""
        other = [(m, m.training) for m, was in zip(self.block.modules(), self.modes, strict=False)
                 if m.training != was]
        for m, now in other:
            m.training = not now
        try:
            yield
        finally:
            for m, now in other:
                m.training = now

    def first(self, tensors: Sequence[Tensor]) -> Any:
        """The block, run for the first time, without a graph."""
        self.modes = [m.training for m in self.block.modules()]
        with again(self.context), unread.running(unread.Run()) as counted, \
                nullcontext() if self.answers is None else self.answers.first(tensors):
            out = self.on(tensors)
        self.products = counted.products
        return out


class _Again(torch.autograd.Function):
    """Outputs of a block, recomputed in backward from what its stretch has kept."""

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Tensor) -> Any:
        ctx.run = run
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        ctx.devices = [torch.device("cpu"), *{t.device: None for t in tensors}]
        ctx.autocast = replay.autocast_state(device)
        given, ctx.params = tensors[:len(run.sources)], tensors[len(run.sources):]
        versions = [version_of(t) for t in given]
        random = replay.rng_state(ctx.devices)
        out = run.first(given)
        # a block that draws nothing leaves nobody's generator to be turned back
        ctx.rng = random if replay.moved(ctx.devices, random) else None
        if versions != [version_of(t) for t in given]:
            raise RuntimeError("a checkpointed block changes its input in place, so backward could "
                               "not run it again from it; clone the input in the block, or leave "
                               "checkpoint out of the recipe")
        ctx.save_for_backward(*[t for t, s in zip(given, run.sources, strict=True) if s is None],
                              *(run.answers.kept() if run.answers is not None else ()))
        leaves, run.out_spec = pytree.tree_flatten(out)
        run.out_leaves = [_TENSOR if isinstance(v, Tensor) else v for v in leaves]
        made = unviewed([v for v in leaves if isinstance(v, Tensor)], tensors)
        ctx.mark_non_differentiable(*[v for v in made if not v.is_floating_point()])
        run.stretch.top, run.stretch.size = weakref.ref(ctx), run.index + 1
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        n = len(ctx.run.sources)
        inputs, made = ctx.run.stretch.take(ctx)
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
