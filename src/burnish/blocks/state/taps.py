"""Hidden states read from a frozen network that runs without a graph, and networks beside it.

The backbone's blocks run under ``no_grad``; what they produce is handed, one tap at a time, to a
side network that owns everything that trains. Backward never enters the backbone.

Letters: D backbone width, S side width, R = D / S.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ..tape.executor import no_grad
from .prompts import Listener, named
from .sideblocks import Plain, Watch


class Gate(nn.Module):
    """``sigma(a / tau) s + (1 - sigma(a / tau)) h``; a scalar, 0 at the start (gate 1/2).

    channels: one a for each instead, and tau = 1; they start at `start`.
    Written as ``h + sigma (s - h)``, so backward keeps one state, s - h.
    """

    def __init__(self, channels: int = 0, start: float = 0.0):
        super().__init__()
        shape, self.tau = ((channels,), 1.0) if channels else ((), 0.1)
        self.alpha = nn.Parameter(torch.full(shape, start if channels else 0.0))
        self.alpha.burnish_decay = False

    def forward(self, s: Tensor, h: Tensor) -> Tensor:
        return h + torch.sigmoid(self.alpha / self.tau).to(h.dtype) * (s - h)


class Down(nn.Linear):
    """D -> S with bias, in the dtype of what it is given."""

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))


class Narrow(nn.Module):
    """``Norm(B swish(A h))``, A (Q, D) and B (S, Q) without biases: D -> S through a bottleneck."""

    def __init__(self, width: int, small: int, bottleneck: int):
        super().__init__()
        self.a = nn.Linear(width, bottleneck, bias=False)
        self.b = nn.Linear(bottleneck, small, bias=False)
        self.norm = nn.LayerNorm(small)

    def forward(self, h: Tensor) -> Tensor:
        a, b, g, c = (t.to(h.dtype) for t in (self.a.weight, self.b.weight, self.norm.weight,
                                              self.norm.bias))
        return F.layer_norm(F.linear(F.silu(F.linear(h, a)), b), g.shape, g, c, self.norm.eps)


class Pool(nn.Module):
    """The mean or the largest of every R neighbouring channels: D -> S, and nothing trains."""

    def __init__(self, how: str, small: int):
        super().__init__()
        self.how, self.small = how, small

    def forward(self, h: Tensor) -> Tensor:
        runs = h.unflatten(-1, (self.small, -1))
        return runs.mean(-1) if self.how == "mean" else runs.amax(-1)


def down(form: str, width: int, small: int, bottleneck: int) -> nn.Module:
    """D -> S. form: linear, low_rank (:class:`Narrow`), mean, max (:class:`Pool`), or random: a
    linear that stays as it is drawn."""
    if form == "low_rank":
        return Narrow(width, small, bottleneck)
    if form in ("mean", "max"):
        return Pool(form, small)
    return Down(width, small).requires_grad_(form == "linear")


class Still(Listener):
    """Listens to the model, or to a part of it that may be run by itself: the modules in `still`
    run in evaluation mode. Dropout in a backbone that does not train only makes its taps noisy.

    part: not the whole model; what its ladder ends with waits for the part that reads it.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, still: list[nn.Module], part: bool = False):
        super().__init__(state, adapter)
        self.__dict__["still"], self.part = still, part

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not self.part:
            self.here.box["whole", self.adapter] = True
        with evaluating(self.still):
            return call(*args, **kw)


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    was = [m for m in modules if m.training]
    for m in was:
        m.training = False
    try:
        yield
    finally:
        for m in was:
            m.training = True


def run_elsewhere(who: Listener) -> bool:
    """Does somebody else's checkpointing run what `who` listens to, or will it again?"""
    cut = getattr(who.here, "grad", False) and not torch.is_grad_enabled()
    return bool(cut or torch.is_grad_enabled() and who.state.tape.others())


class Beside(Listener):
    """Listens to one block of a backbone that runs without a graph."""

    what = "a side network"
    #: keeps what the blocks return (tap_cache.py), and which of them this one is
    cache: Any = None
    number = 0

    def kept(self, cache: Any, number: int) -> Beside:
        self.cache, self.number = cache, number
        return self

    def quiet(self, module: nn.Module, call: Callable[..., Any], args: tuple, kw: dict[str, Any],
              note: Callable[[], bool | None] = lambda: None) -> tuple[Any, bool | None]:
        """(what the block returns, without a graph; what `note` says of its run): it may be read
        where it has been kept."""
        if self.cache is None:
            return no_grad(module, call, args, kw), None
        out, said = self.cache.run(self, self.number, module, call, args, kw, note)
        return out, said

    def alone(self, module: nn.Module, given: Tensor, args: tuple, kw: dict[str, Any]
              ) -> tuple[tuple, dict[str, Any]]:
        """The arguments without a cache, where nothing forbids that the block runs so."""
        self._runs_once(module)
        if given.requires_grad and not (getattr(module, "gradient_checkpointing", False)
                                        and not _trains(given.grad_fn)):
            raise RecipeError(f"{self.adapter}: something below {type(module).__name__} trains or "
                              "carries a gradient, but the backbone of a side network runs "
                              "without a graph: its gradient would be cut; drop that part or the "
                              "side network")
        return self.uncached(args, kw)

    def uncached(self, args: tuple, kw: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments, in training without a key-value cache: it would keep every layer's."""
        if torch.is_grad_enabled():
            args, kw = _uncached(args), dict(zip(kw, _uncached(tuple(kw.values())), strict=True))
            if kw.get("use_cache"):
                kw["use_cache"] = False
        return args, kw

    def _runs_once(self, module: nn.Module) -> None:
        """Somebody else's checkpointing would run a block again without the state beside it."""
        if run_elsewhere(self):
            raise RecipeError(f"{self.adapter}: {type(module).__name__} runs inside a gradient "
                              "checkpointing that is not burnish's; a second run would lack the "
                              "state that climbs beside the blocks, and a frozen backbone keeps "
                              "nothing for backward anyway: switch that checkpointing off")


class Rung(Beside):
    """One step of a ladder beside one block: ``s <- g(gate(s, D h))``, h what the block returned.

    Listens to the block, which runs without a graph. down, gate and side are absent in a block
    the ladder skips. enter: this is the first block; s starts as ``D_first`` of its input, or,
    where D is no linear and the block has one, as D of it. form, bottleneck: see :func:`down`.
    channels: a gate for each.
    """

    def __init__(self, state: Any, adapter: str, side: nn.Module | None, width: int, small: int,
                 *, enter: bool = False, form: str = "linear", bottleneck: int = 16,
                 channels: bool = False):
        super().__init__(state, adapter)
        sizes = form, width, small, bottleneck
        self.enter, own = enter, enter and (form == "linear" or side is None)
        self.first = down(*sizes) if own else None
        self.down = self.gate = None
        self.side = side
        if side is not None:
            self.down, self.gate = down(*sizes), Gate(small if channels else 0, 0.5)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = args[0] if args else next(iter(kw.values()))
        args, kw = self.alone(module, given, args, kw)
        box, key = self.here.box, ("side", self.adapter)
        watch = Watch(self.state.tape) if isinstance(self.side, Plain) else None
        with watch or _nothing():
            out, causal = self.quiet(module, call, args, kw,
                                     lambda: None if watch is None else watch.causal())
        if self.enter:
            box[key] = (self.down if self.first is None else self.first)(given)
        if self.side is not None:
            tap = out[0] if isinstance(out, tuple) else out
            u = self.gate(box[key], self.down(tap))
            if watch is not None:
                masked = watch.mask() if self.cache is None else (None, causal)
                box[key] = self.side(u, *masked)
            else:
                box[key] = self._again(u, module, args, kw)
        return out

    def _again(self, u: Tensor, module: nn.Module, args: tuple, kw: dict[str, Any]) -> Tensor:
        """The side block on what its own block was given, with the state, the positions and the
        encoder's states its own."""
        box, bias = self.here.box, ("side positions", self.adapter)
        given = named(module, args, kw)
        first = next(iter(given)) if args else next(iter(kw))
        if "position_embeddings" in given:
            given["position_embeddings"] = _small_rotary(given["position_embeddings"], self.side)
        if given.get("encoder_hidden_states") is not None and not _has_read(given, self.side):
            given["encoder_hidden_states"] = read(self, given["encoder_hidden_states"])
        own = dict(zip(BIASES, box.get(bias, (None, None)), strict=True))
        given |= {k: v for k, v in own.items() if k in given}
        _second_cache(given.values(), self.side)
        del given[first]
        out = self.side(u, **given)              # by position: checkpointing looks there alone
        if BIASES[0] in given:                       # made by the first, handed on by the others
            box[bias] = (*out[1:3], None)[:2]
        return out[0] if isinstance(out, tuple) else out


#: relative positions that blocks of one stack share: arguments, and results behind the state
BIASES = ("position_bias", "encoder_decoder_position_bias")


def _trains(node: Any) -> bool:
    """Does a parameter stand below this node of the graph? (Models that checkpoint themselves make
    their embeddings carry a gradient that nobody reads.)"""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        todo += [n for n, _ in node.next_functions]
    return False


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _uncached(values: tuple) -> tuple:
    return tuple(None if hasattr(v, "get_seq_length") else v for v in values)


def _has_read(given: dict[str, Any], side: nn.Module) -> bool:
    """Does a cache hold what the side block made of the encoder's states?"""
    cache = given.get("past_key_values")
    return bool(getattr(cache, "is_updated", {}).get(side.cache_index))


def _second_cache(given: Iterable[Any], side: nn.Module) -> None:
    """Room behind the backbone's layers of a key-value cache for the side block's own."""
    cache = next((v for v in given if hasattr(v, "get_seq_length")), None)
    halves = (getattr(cache, f"{n}_attention_cache", None) for n in ("self", "cross"))
    for part in [c for c in halves if c is not None] or [cache][: cache is not None]:
        while len(part.layers) <= side.cache_index:
            fresh = copy.copy(part.layers[side.beside])
            fresh.keys = fresh.values = None
            fresh.is_initialized = False
            if hasattr(fresh, "cumulative_length"):
                fresh.cumulative_length = 0
            part.layers.append(fresh)


def _small_rotary(tables: Any, side: nn.Module) -> Any:
    """(cos, sin) for a head of width h / R: every R-th frequency, which are exactly its own.

    The tables repeat their h / 2 frequencies twice; frequency j of the small head is frequency
    R j of the large one.
    """
    if not isinstance(tables, tuple):
        return tables
    step = side.reduction
    made = []
    for t in tables:
        half = t[..., : t.shape[-1] // 2][..., ::step]
        made.append(torch.cat([half, half], -1))
    return tuple(made)


class Crown(Listener):
    """The ladder's end: ``y = gate(U Norm(s), h)``, h what the listened module returns.

    Listens to the backbone's last norm, or to its last block when there is none. channels: a gate
    for each, of 0.27 for the ladder at the start.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, norm: nn.Module, width: int, small: int,
                 channels: bool = False):
        super().__init__(state, adapter)
        self.norm, self.up = norm, Down(small, width)
        self.gate = Gate(width if channels else 0, -1.0)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        h = out[0] if isinstance(out, tuple) else out
        self.here.box.pop(("side positions", self.adapter), None)
        s = self.here.box.pop(("side", self.adapter))
        y = self.gate(self.up(self.norm(s)), h)
        return (y, *out[1:]) if isinstance(out, tuple) else y


class Foot(Listener):
    """The end of an encoder's ladder: ``Norm(s)``, what the decoder's side blocks attend to.

    Listens like a :class:`Crown`; the encoder's own answer stays as it is.
    """

    what = "a side network"

    def __init__(self, state: Any, adapter: str, norm: nn.Module):
        super().__init__(state, adapter)
        self.norm = norm

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        box = self.here.box
        box.pop(("side positions", self.adapter), None)
        s = self.norm(box.pop(("side", self.adapter)))
        key, whole = ("encoded", self.adapter), ("whole", self.adapter) in box
        if whole:
            box[key] = s
        if whole and torch.is_grad_enabled():        # nothing outlives a step
            self.state.tape.apart.pop(key, None)
        else:                                        # a decoder may be run on it by itself
            self.state.tape.apart[key] = (out[0] if isinstance(out, tuple) else out, s)
        return out


def read(who: Listener, h: Tensor) -> Tensor:
    """The side encoder's states that belong to states h of the encoder.

    Within a forward of the whole model, those of its encoder. Else those of the encoder's last run
    in this thread (by itself, or without a graph), if h is what it returned, or that with every
    sample repeated (beams).
    """
    box, apart = who.here.box, who.state.tape.apart
    key = ("encoded", who.adapter)
    if key in box:
        return box[key]
    known, s = apart.get(key, (None, None))
    if known is not h:
        n = len(h) // len(known) if known is not None and known.shape[1:] == h.shape[1:] else 0
        if not n or not torch.equal(known.repeat_interleave(n, 0), h):
            raise RecipeError(f"{who.adapter}: these encoder states are not of the encoder's last "
                              "run, so the side network has none that belong to them: run the "
                              "tuned model's own encoder on the inputs first")
        s = s.repeat_interleave(n, 0)
        apart[key] = (h, s)
    return s
