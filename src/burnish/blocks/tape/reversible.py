"""Blocks that keep nothing: backward computes a block's inputs from its outputs.

Two streams pass through a block, with scalars l and b:

    y1 = l h1 + F(h2)        h2 = (y2 - G(y1)) / b
    y2 = b h2 + G(y1)        h1 = (y1 - F(h2)) / l

and enter the next block switched, (h1, h2) = (y2, y1); in the first block both are its input. The
model's own loop passes the stream that stands for the state; the other one waits in the call.

What is kept is the pair before the last block and, every S blocks below it, the pair before an
anchor; a block in between takes its outputs from the block above it, in the same backward. F and G
run again with the random numbers and the autocast of their forward.

Inverting multiplies rounding errors by ``2 / (sqrt(1 + 4 l b) - 1)`` per block (:func:`growth`),
so streams are fp32 at least, and :func:`reach` says how many blocks may be inverted in a row: none
that computes in half precision. In the first block both streams come out as the same tensor; how
far they are apart is watched.

Fixed streams are inverted exactly, whatever the precision and the depth: numbers are whole
multiples of 2^-16 (held in fp64, which loses none), what F and G return is rounded to them, one
scalar is 1 and the other 2^-k, and the k bits that a division by 2^k drops are kept, k / 8 bytes a
number. Gradients take rounding for the identity. F and G must give the same numbers again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ...core.call import again, current
from ...core.errors import RecipeError
from ..state.prompts import Listener
from . import replay
from .codes import packed, unpacked
from .executor import _uncached, trained
from .functions import once_differentiable, transformed, version_of
from .notes import Seen

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.method import Method

#: relative error of a reconstructed state that gradients bear
ERROR = 1e-3
#: fixed streams are whole multiples of one over this
GRID = 2.0 ** 16
Fn = Callable[[Tensor], Tensor]


def growth(first: float, second: float) -> float:
    """Factor by which inverting one block of unit gain multiplies a rounding error."""
    return 2 / (math.sqrt(1 + 4 * first * second) - 1)


def reach(first: float, second: float, dtype: torch.dtype) -> int:
    """Blocks that can be inverted in a row before rounding reaches :data:`ERROR`; 1 at least."""
    rate = growth(first, second)
    if rate <= 1:
        return 1 << 30
    return max(1, int(math.log(ERROR / torch.finfo(dtype).eps) / math.log(rate)))


def _gridded(t: Tensor) -> Tensor:
    """Rounded to the grid; the gradient of the identity."""
    t = t.to(torch.float64)
    return _Straight.apply(t, t.detach().mul(GRID).round_().div_(GRID), 1.0)


def _divided(h: Tensor, by: float) -> tuple[Tensor, Tensor | None]:
    """(h / by down to the grid, the bits this drops, packed; None where by is 1)."""
    if by == 1:
        return h, None
    whole = h.detach() * GRID
    down = (whole / by).floor_()
    dropped = packed((whole - down * by).to(torch.uint8).view(-1), int(math.log2(by)))
    return _Straight.apply(h, down.div_(GRID), 1 / by), dropped


def _multiplied(h: Tensor, by: float, dropped: Tensor | None) -> Tensor:
    """What :func:`_divided` was given."""
    if dropped is None:
        return h
    low = unpacked(dropped, int(math.log2(by)), h.numel()).view(h.shape)
    return (h * by).add_(low.to(h.dtype), alpha=1 / GRID)


class _Straight(torch.autograd.Function):
    """`made`, which stands for ``slope * t`` in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, made: Tensor, slope: float) -> Tensor:
        return made.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.slope = inputs[2]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * ctx.slope, None, None


@dataclass(eq=False)
class _Run:
    """The segment in one forward: the stream beside the state, and what backward hands down."""

    state: Tensor                                # what the model's loop was given, and its version
    version: int
    streams: tuple[Tensor, Tensor]               # of the next block
    recorded: set[int] = field(default_factory=set)          # blocks that wait for a pair
    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Reversible(Listener):
    """One block of the segment. Listens to the block, whose run (with what is added to it) is one
    of both functions, and owns the other one.

    index: in the segment. above: blocks of the segment above it. scales: (l, b).
    beside: the other function; None where nothing reads its stream (the last block, as F).
    block_first: the block is F and the state y1; else it is G and the state y2.
    anchors: a pair is kept before every n-th block, counted from the last; 0: before that alone;
    None: as often as rounding needs (:func:`reach`). fixed: fixed streams, which need none.
    """

    what = "a reversible block"

    def __init__(self, state: Any, adapter: str, index: int, above: int,
                 scales: tuple[float, float], beside: nn.Module | None, *, block_first: bool,
                 anchors: int | None, fixed: bool = False):
        super().__init__(state, adapter)
        self.index, self.above, self.scales = index, above, scales
        self.beside = beside
        self.block_first, self.anchors, self.fixed = block_first, anchors, fixed

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        grad = torch.is_grad_enabled()
        if grad:
            args, kw = _uncached(args, kw)
        name, given = (None, args[0]) if args else next(iter(kw.items()))
        run = self._entered(given)
        block = _Block(module, call, args, kw, name, given)
        h1, h2 = run.streams
        params = trained(module)
        wanted = grad and (h1.requires_grad or h2.requires_grad or bool(params))
        if wanted or getattr(self.here, "grad", False):
            self._runs_once(module, block)
        if not wanted or transformed():
            y1, y2 = self.forth(block, h1, h2)
        else:
            link = _Link(self, block, run, params)
            if not link.kept:
                run.recorded.add(self.index)
            y1, y2 = _Step.apply(link, h1, h2, *params)
        state = y1 if self.block_first else y2
        out = state.to(given.dtype)
        if self.above:
            run.state, run.version, run.streams = out, version_of(out), (y2, y1)
            self.here.box[self._key] = run
        return block.result(out)

    @property
    def _key(self) -> tuple[str, str]:
        return "reversible", self.adapter

    def _entered(self, given: Tensor) -> _Run:
        """What the block below left, if it is what this block is given."""
        run = self.here.box.pop(self._key, None)
        if self.index == 0:
            h = _gridded(given) if self.fixed else \
                given.to(torch.promote_types(given.dtype, torch.float32))
            return _Run(given, version_of(given), (h, h))
        if run is None or run.state is not given or run.version != version_of(given):
            raise RecipeError(f"{self.adapter}: the model does something to the state between two "
                              "reversible blocks (or runs one alone, or twice), so the stream "
                              "beside it would not fit; reversible blocks must follow each other "
                              "directly")
        return run

    def _runs_once(self, module: nn.Module, block: _Block) -> None:
        cut = getattr(self.here, "grad", False) and not torch.is_grad_enabled()
        if cut or self.state.tape.others():
            raise RecipeError(f"{self.adapter}: {type(module).__name__} runs inside a gradient "
                              "checkpointing that is not burnish's; a second run would lack the "
                              "stream beside the state, and a reversible block keeps nothing "
                              "anyway: switch that checkpointing off")
        if block.crossed():
            raise RecipeError(f"{self.adapter}: {type(module).__name__} reads another tensor that "
                              "carries a gradient besides its state, which a reversible block "
                              "cannot give back; leave out what trains there, or this part")

    def forth(self, block: _Block, h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y1, y2), by plain torch functions."""
        F, G = self.functions(block)
        first, second = self.scales
        if self.fixed:
            y1 = _divided(h1, 1 / first)[0] + F(h2)
            return y1, None if G is None else _divided(h2, 1 / second)[0] + G(y1)
        y1 = first * h1 + F(h2)
        return y1, None if G is None else second * h2 + G(y1)

    def functions(self, block: _Block) -> tuple[Fn, Fn | None]:
        """F and G on streams."""
        def whole(h: Tensor) -> Tensor:
            made = block.run(h)
            return _gridded(made) if self.fixed else \
                made.to(h.dtype, copy=made.dtype == h.dtype)

        def other(h: Tensor) -> Tensor:
            made = self.beside(h.to(block.dtype))
            return _gridded(made) if self.fixed else made.to(h.dtype)

        alone = None if self.beside is None else other
        return (whole, alone) if self.block_first else (alone, whole)

    def keeps(self, block: _Block, streams: Tensor) -> bool:
        """Is the pair before this block kept?"""
        every = 0 if self.fixed else self.anchors
        if every is None:
            # what a block rounds to half precision jumps where its input moves by less than that
            _, cast, dtype = replay.autocast_state(streams.device)
            half = block.dtype.itemsize < 4 or cast and dtype.itemsize < 4
            every = 1 if half else reach(*self.scales, streams.dtype) + 1
        return not self.above or bool(every) and self.above % every == 0


class _Block:
    """One call of a block, to be run on other states."""

    def __init__(self, module: nn.Module, call: Callable[..., Any], args: tuple, kw: dict,
                 name: str | None, given: Tensor):
        self.module, self.call, self.dtype, self.shape = module, call, given.dtype, given.shape
        self.name = name
        self.args, self.kw = (args[1:], kw) if name is None else ((), {k: v for k, v in kw.items()
                                                                       if k != name})
        self.rest: tuple | None = None

    def crossed(self) -> bool:
        return any(t.requires_grad for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """What it reads besides the state."""
        leaves = pytree.tree_leaves((self.args, self.kw))
        return [t for t in leaves if isinstance(t, Tensor)]

    def run(self, h: Tensor) -> Tensor:
        h = h.to(self.dtype)
        out = self.call(h, *self.args, **self.kw) if self.name is None else \
            self.call(**{self.name: h}, **self.kw)
        self.rest = None
        if isinstance(out, tuple):
            out, self.rest = out[0], out[1:]
        if not isinstance(out, Tensor) or any(v is not None for v in self.rest or ()):
            raise RecipeError(f"{type(self.module).__name__} returns more than its state, which a "
                              "reversible block cannot give back; ask the model for its states "
                              "alone (no attentions, no cache), or leave this part out")
        if out.shape != self.shape:
            raise RecipeError(f"{type(self.module).__name__} makes a state of {tuple(out.shape)} "
                              f"from one of {tuple(self.shape)}; a reversible block keeps the "
                              "shape")
        return out

    def result(self, state: Tensor) -> Any:
        return state if self.rest is None else (state, *self.rest)


class _Link:
    """A recorded block: how it runs forth without a graph, and back."""

    def __init__(self, owner: Reversible, block: _Block, run: _Run, params: list[Tensor]):
        self.owner, self.block, self.run, self.params = owner, block, run, params
        self.context, self.recording = current(), owner.state.tape.recording
        device = run.streams[0].device
        self.devices = [torch.device("cpu"), device]
        self.autocast = replay.autocast_state(device)
        self.kept = owner.keeps(block, run.streams[0])
        self.seen = Seen([*block.tensors(), *block.module.parameters()])
        self.random: list[replay.States] = []

    def forth(self, h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor | None, list[Any]]:
        """(y1, y2, the bits that were dropped on the way)."""
        F, G = self.owner.functions(self.block)
        (first, second), fixed = self.owner.scales, self.owner.fixed
        dropped: list[Any] = [None, None]
        with again(self.context):
            self.random = [replay.rng_state(self.devices)]
            if fixed:
                down, dropped[0] = _divided(h1, 1 / first)
                y1 = F(h2).add_(down)
            else:
                y1 = F(h2).add_(h1, alpha=first)
            self.random.append(replay.rng_state(self.devices))
            if G is None:
                return y1, None, dropped
            if fixed:
                down, dropped[1] = _divided(h2, 1 / second)
                return y1, G(y1).add_(down), dropped
            return y1, G(y1).add_(h2, alpha=second), dropped

    def back(self, saved: tuple[Any, ...], d1: Tensor | None, d2: Tensor | None
             ) -> tuple[Any, ...]:
        """(dh1, dh2, gradients of the parameters), d1 and d2 those of y1 and y2."""
        self.seen.check(self.seen.tensors, lambda k: "what a reversible block reads")
        F, G = self.owner.functions(self.block)
        first, second = self.owner.scales
        grads: list[Tensor | None] = [None] * len(self.params)
        below = self.run.pairs.pop(self.owner.index, None)
        fixed, kept = self.owner.fixed, saved if self.kept else ()
        if kept:
            h1, h2 = kept
            leaf, f = self._run(F, h2, self.random[0], True)
            if G is not None:
                y1 = f.detach() + (_divided(h1, 1 / first)[0] if fixed else first * h1)
                d1 = _plus(d1, self._pull(G, y1, d2, self.random[1], grads)[1])
            dh2 = None if d1 is None else self._gradients(f, leaf, d1, grads)
            del f
        else:
            if below is None:
                raise RuntimeError("a state between two reversible blocks was read by something "
                                   "whose backward came alone; the blocks above it hold what it "
                                   "needs: make one loss of both")
            y1, y2 = below
            g, pulled = self._pull(G, y1, d2, self.random[1], grads)
            d1 = _plus(d1, pulled)
            h2 = _multiplied(y2 - g, 1 / second, saved[1]) if fixed else (y2 - g).div_(second)
            f, dh2 = self._pull(F, h2, d1, self.random[0], grads)
            h1 = _multiplied(y1 - f, 1 / first, saved[0]) if fixed else (y1 - f).div_(first)
        self._hand_down(h1, h2, bool(kept))
        dh1 = None if d1 is None else d1 * first
        dh2 = _plus(dh2, None if d2 is None else d2 * second)
        return dh1, dh2, *grads

    def _hand_down(self, h1: Tensor, h2: Tensor, kept: bool) -> None:
        i = self.owner.index
        if i and i - 1 in self.run.recorded:
            self.run.pairs[i - 1] = (h2, h1)
        elif i == 0 and not kept and not isinstance(h1, FakeTensor):
            off = float((h1 - h2).abs().max() / h2.abs().max().clamp_min(1e-30))
            if off > 10 * ERROR:
                warnings.warn(f"reversible blocks: rounding has grown to {off:.1g} of the state on "
                              "the way down, so gradients below are wrong; keep a pair more often "
                              "(anchors), or take larger factors", stacklevel=2)

    def _run(self, fn: Fn, h: Tensor, random: replay.States, graph: bool) -> tuple[Tensor, Tensor]:
        leaf = h.detach().requires_grad_(graph)
        with again(self.context), torch.set_grad_enabled(graph), \
                replay.replay(self.devices, random), \
                replay.autocast(self.autocast, cache=graph), self.recording():
            return leaf, fn(leaf)

    def _pull(self, fn: Fn, h: Tensor, d: Tensor | None, random: replay.States,
              grads: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """(fn(h), the gradient of h); those of parameters are added to `grads`."""
        leaf, out = self._run(fn, h, random, d is not None)
        return out.detach(), None if d is None else self._gradients(out, leaf, d, grads)

    def _gradients(self, out: Tensor, leaf: Tensor, d: Tensor, grads: list[Tensor | None]
                   ) -> Tensor | None:
        dh, *got = torch.autograd.grad(out, [leaf, *self.params], d, allow_unused=True)
        for k, g in enumerate(got):
            grads[k] = _plus(grads[k], g)
        return dh


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class _Step(torch.autograd.Function):
    """(y1, y2) of one block; keeps its inputs at an anchor, else nothing."""

    @staticmethod
    def forward(ctx: Any, link: _Link, h1: Tensor, h2: Tensor, *params: Tensor) -> Any:
        ctx.link = link
        ctx.set_materialize_grads(False)
        y1, y2, dropped = link.forth(h1, h2)
        ctx.save_for_backward(*((h1, h2) if link.kept else dropped))
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor | None, d2: Tensor | None) -> tuple[Any, ...]:
        return None, *ctx.link.back(ctx.saved_tensors, d1, d2)


def reversible_blocks(part: Method, anatomy: Anatomy, last: int | None) -> list[Block]:
    """The `last` blocks of the model's one stack (None: all), where they can run reversibly.
    RecipeError where they cannot."""
    who = part.name
    if part.targets is not None:
        raise RecipeError(f"{who} takes no targets: it runs whole blocks; choose the last n with "
                          f"{who}(layers=n)")
    stacks = anatomy.stacks()
    if len(stacks) != 1:
        raise RecipeError(f"{who}: this model has "
                          + (f"several stacks of blocks ({', '.join(stacks)}); what one hands the "
                             "other would have to be reversed too" if stacks else
                             "no repeated blocks to reverse"))
    blocks = next(iter(stacks.values()))
    n = len(blocks) if last is None else last
    if not 1 <= n <= len(blocks):
        raise RecipeError(f"{who}(layers={n}): this model has {len(blocks)} blocks")
    blocks = blocks[-n:]
    if len({b.hidden_size or anatomy.hidden_size for b in blocks} - {None}) != 1:
        raise RecipeError(f"{who}: the blocks have different widths, or none that can be told; "
                          "streams have one")
    for b in blocks:
        if b.cross:
            raise RecipeError(f"{who}: {b.path} reads another stack through cross-attention; a "
                              "reversible block has no input but its state")
        module = anatomy.model.get_submodule(b.path)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
            raise RecipeError(f"{who}: {b.path} holds a batch norm, whose statistics a second run "
                              "would move again")
    return blocks
