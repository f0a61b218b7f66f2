"""What is added to one module, and how that module then runs.

A touched module keeps its identity: its class becomes a subclass of the same name, its
parameters keep their names, and one child, ``module.burnish``, owns everything added::

    inputs -> branches at the input -> the module's own forward on its effective weights
           -> branches at the output -> outputs
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.tape.executor import MODES, in_graph
from ..blocks.weight.convolved import convolved
from ..blocks.weight.provided import Weighted, linear
from ..blocks.weight.term import Provider, Wrap
from ..core.call import Call, again, call_of, current, resume
from ..core.errors import RecipeError
from ..core.site import Branch, Place
from .layout import as_stored, is_conv, is_conv1d, is_linear, segments, whole
from .rows import check_rows, split
from .starts import with_starts
from .state import Part, State
from .swap import ATTR, expose, tuned_class


class Slot(nn.Module):
    """Everything burnish adds to one module. Children: one container per adapter."""

    def __init__(self, state: State, path: str):
        super().__init__()
        self.__dict__["state"] = state
        self.path = path
        self.parts: list[Part] = []
        self.providers: dict[str, str] = {}          # parameter -> child name
        self.stored_by: dict[str, str] = {}          # parameter -> the storage that made it
        self.absorbed: list[Part] = []               # starts that a provider holds subtracted
        self.shells: dict[str, nn.Parameter] = {}    # parameters that a provider answers for
        self.mode: str | None = None
        self.root = False
        self.reads: set[tuple[str, str]] = set()     # taps other slots want from here
        self.listeners: list[Callable[..., Any]] = []  # around the forward, outermost first
        self._plans: tuple[int, dict[Any, Any]] = (-1, {})     # of one version, by what is active

    # -- building -----------------------------------------------------------------------------
    def add(self, adapter: str, key: str, module: nn.Module, place: Place | None = None,
            branch: Branch | None = None) -> str:
        """Own `module` under ``<adapter>.<key>``; returns the key that was free."""
        if adapter not in self._modules:
            self.add_module(adapter, nn.ModuleDict())
        home, name, n = self._modules[adapter], key, 1
        while name in home:
            n += 1
            name = f"{key}_{n}"
        home[name] = module.train(self.training)
        for p in module.parameters():            # `use` switches the others on and off
            p.burnish_frozen = not p.requires_grad
        self.parts.append(Part(adapter, name, place, branch))
        if place is None and branch is None:
            self.state.listening.append(adapter)
        self.state.version += 1
        return name

    def provide(self, param: str, provider: Provider) -> None:
        name = "provided_" + param.replace(".", "_")
        self.add_module(name, provider)
        self.providers[param] = name
        self.state.version += 1

    def drop(self, adapter: str) -> None:
        self._modules.pop(adapter, None)
        self.parts = [p for p in self.parts if p.adapter != adapter]
        self.absorbed = [p for p in self.absorbed if p.adapter != adapter]
        for names in self.state.readers.values():
            names[:] = [n for n in names if n != adapter]
        self.state.version += 1
        self.state.gone[adapter] = self.state.version
        self.state.context.pop(adapter, None)
        self.state.listening[:] = [a for a in self.state.listening if a != adapter]

    def module_of(self, part: Part) -> nn.Module:
        return self._modules[part.adapter][part.key]

    @property
    def idle(self) -> bool:
        """Nothing left to do here."""
        return not (self.parts or self.providers or self.mode or self.root or self.reads
                    or self.listeners)

    # -- running ------------------------------------------------------------------------------
    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        state = self.state
        if torch.compiler.is_compiling():
            return self._traced(module, forward, args, kw)
        call = call_of(state)
        if call is None:
            return self._outermost(module, forward, args, kw)
        run = functools.partial(self._inside, module, forward)
        for listener in self.listeners:
            run = functools.partial(listener, module, run)
        if self.mode and not call.off:
            return MODES[self.mode](module, run, args, kw, state.tape.recording)
        return run(*args, **kw)

    def _outermost(self, module: nn.Module, forward: Callable[..., Any], args: tuple,
                   kw: dict) -> Any:
        """The first of ours that runs in this thread: it opens the call, and the tape.

        Usually the root. Else a part of the model was called by itself; or, in backward, somebody
        else's checkpointing runs it again: then in the call whose tensors he has just asked for.
        """
        state = self.state
        then = None if self.root else state.tape.last_opened()
        call = state.open(module, args, kw) if then is None else then
        if self.root:
            kw, call = state.take(module, kw, call)
        if self.root and call.rows is not None:
            check_rows(call.rows, args, kw)
        with again(call, state.loose(self.root)), state.tape.recording():
            out = self.run(module, forward, args, kw)
        return state.riding.end(args, kw, out) if self.root and not call.off else out

    def _traced(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        """In a graph that is compiled. The compiler decides what is kept, so there is no tape; the
        facts of the call are constants of the graph, which its guards watch. What a graph cannot
        hold (listeners, taps, weights that stand in for others) runs as it is, beside it."""
        state = self.state
        why = state.beside if self.root else ""
        if why or not self._graphable(module, forward):
            return _beside(self, module, forward, args, kw, why)
        call = Call(state, state.active, version=state.version)
        if self.mode == "checkpoint" and torch.is_grad_enabled():
            return in_graph(lambda *a, **k: self._active(module, forward, call, a, k), args, kw)
        return self._active(module, forward, call, args, kw)

    def _graphable(self, module: nn.Module, forward: Callable[..., Any]) -> bool:
        state = self.state
        if state.off_here or state.rows is not None or self.listeners or self.reads \
                or self.mode not in (None, "checkpoint"):
            return False
        if not any(p.place for p in self.parts) and not self.providers:
            return True
        return is_linear(module, forward)

    def _inside(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        call = call_of(self.state)
        if call.off:
            return self._base(module, forward, args, kw)
        if call.rows is not None and any(p.adapter in call.rows and (p.place or p.branch)
                                         for p in self.parts):
            return self._per_sample(module, forward, call, args, kw)
        return self._active(module, forward, call, args, kw)

    def _per_sample(self, module: nn.Module, forward: Callable[..., Any], call: Call,
                    args: tuple, kw: dict) -> Any:
        """Each sample through its own adapter: the batch is split, run and put together."""
        def run(name: str | None, a: tuple, k: dict, valid: Any, given: dict) -> Any:
            active = () if name is None else ((name, 1.0),)
            own = replace(call, active=active, rows=None, valid=valid, given=given)
            with resume(own):
                return self._active(module, forward, own, a, k)

        return split(call.rows, run, args, kw, call.valid, dict(call.given))

    def _active(self, module: nn.Module, forward: Callable[..., Any], call: Call, args: tuple,
                kw: dict) -> Any:
        groups, before, after = self._planned(module, call.active)
        given = _first(args, kw)
        self._tap("input", given, call)
        for part, scale in before:
            x = _first(args, kw)
            made = self._branch(part, scale, x, x)
            args, kw = ((made, *args[1:]), kw) if args else ((), {**kw, next(iter(kw)): made})
        out = self._weighted(module, forward, groups, args, kw) if groups else \
            self._base(module, forward, args, kw)
        if after:
            first = out[0] if isinstance(out, tuple) else out
            for part, scale in after:
                path, what = part.branch.read
                if path in ("", self.path):
                    seen = first if what == "output" else given
                else:
                    seen = self._seen(path, what, part, call)
                first = self._branch(part, scale, seen, first)
            out = (first, *out[1:]) if isinstance(out, tuple) else first
        self._tap("output", out[0] if isinstance(out, tuple) else out, call)
        return out

    def _tap(self, what: str, value: Any, call: Call) -> None:
        """Keep a state for the branches elsewhere that read it, until the last one has."""
        if (self.path, what) in self.reads:
            wanted = dict(call.active)
            n = sum(bool(wanted.get(a)) for a in self.state.readers.get((self.path, what), ()))
            if n:
                call.box[self.path, what] = [value, n]

    def _seen(self, path: str, what: str, part: Part, call: Call) -> Any:
        entry = call.box.get((path, what))
        if entry is None:
            raise RecipeError(f"{part.key} in {self.path} reads the {what} of {path}, which did "
                              "not run before it in the same block: a block that runs again in "
                              "backward sees only what it is given; drop the checkpointing")
        entry[1] -= 1
        if not entry[1]:
            del call.box[path, what]
        return entry[0]

    def _branch(self, part: Part, scale: float, seen: Tensor, h: Tensor) -> Tensor:
        made = self.module_of(part)(seen)
        if part.branch.compose == "replace":
            return made if scale == 1 else h + scale * (made - h)
        return h + (made if scale == 1 else scale * made)

    def _base(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        if self.providers and is_linear(module, forward):
            op = Weighted(functools.partial(self._matrix, module, "weight"), [],
                          held=functools.partial(self._held, module, "weight"))
            return linear(_first(args, kw), op, module.bias)
        with ExitStack() as stack:
            for param in self.providers:
                make = functools.partial(self._stored, module, param)
                stack.enter_context(self._noted(module, param, make, self._held(module, param)))
            return forward(module, *args, **kw)

    # -- weights ------------------------------------------------------------------------------
    def _planned(self, module: nn.Module, active: Any) -> tuple[list, list, list]:
        version, made = self._plans
        if version != self.state.version:
            self._plans = version, made = self.state.version, {}
        if active not in made:
            made[active] = self._make_plan(module, active)
        return made[active]

    def _make_plan(self, module: nn.Module, active: Any) -> tuple[list, list, list]:
        weights = dict(active)
        call = current()
        for name in weights if call is not None else ():
            if self.state.gone.get(name, -1) > call.version:
                raise RecipeError(f"this forward ran with the adapter {name!r}, which has been "
                                  "taken out since: its backward can no longer run")
        groups: dict[tuple, tuple[Place, list, list]] = {}
        before, after = [], []
        for part in self.parts:
            scale = weights.get(part.adapter)
            if not scale:
                continue
            made = self.module_of(part)
            if part.branch is None and part.place is None:
                continue                             # a listener: it wraps the run by itself
            if part.branch is not None:
                (before if part.branch.at == "input" else after).append((part, scale))
                continue
            place = part.place
            _, terms, wraps = groups.setdefault((place.param, place.rows), (place, [], []))
            if isinstance(made, Wrap):
                if scale != 1:
                    raise RecipeError(f"{part.adapter!r} holds a function of W "
                                      f"({part.key}); it can be used whole, not at {scale}")
                wraps.append(made)
            else:
                terms.append((made, scale))
        ops = []
        for place, terms, wraps in groups.values():
            if len(wraps) > 1:
                raise RecipeError(f"{place.name} has {len(wraps)} functions of W active at once; "
                                  "only one may wraps the others' sum: use one adapter at a time")
            base = functools.partial(self._place_view, module, place)
            held = functools.partial(self._held, module, place.param)
            ops.append((place, Weighted(base, terms, wraps[0] if wraps else None, held)))
        return ops, before, after

    def _stored(self, module: nn.Module, param: str) -> Tensor:
        if param in self.providers:
            value = self._modules[self.providers[param]].weight()
            return with_starts(self, value, param) if self.absorbed else value
        *parents, leaf = param.split(".")
        for p in parents:
            module = getattr(module, p)
        own = module._parameters.get(leaf)
        return own if own is not None else getattr(module, leaf)

    def _held(self, module: nn.Module, param: str) -> list[Tensor]:
        """The tensors that :meth:`_stored` reads; none where the weight is computed."""
        if param in self.providers:
            return list(self._modules[self.providers[param]].buffers())
        stored = self._stored(module, param)
        return [stored] if isinstance(stored, nn.Parameter) else []

    def _place_view(self, module: nn.Module, place: Place) -> Tensor:
        return place.view(self._stored(module, place.param))

    def _matrix(self, module: nn.Module, param: str) -> Tensor:
        w = self._stored(module, param)
        return w.t() if is_conv1d(module) else w

    def _weighted(self, module: nn.Module, forward: Callable[..., Any], groups: list,
                  args: tuple, kw: dict) -> Any:
        place, op = groups[0]
        if is_linear(module, forward) and all(p.param == "weight" for p, _ in groups):
            if len(groups) == 1 and place.rows is None:
                return linear(_first(args, kw), op, module.bias, self._trained(module, place))
            if place.rows is not None and all(p.rows for p, _ in groups):
                return self._sliced(module, groups, _first(args, kw))
        if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward \
                and len(groups) == 1 and op.wrap is None:
            out = forward(module, *args, **kw)
            for term, scale in op.terms:
                out = out + scale * term.take(_first(args, kw), module.padding_idx).to(out.dtype)
            return out
        if len(groups) == 1 and op.wrap is None and is_conv(module, forward) \
                and (dropped := [ts for ts in op.terms if _drops(ts[0])]):
            return self._beside(module, forward, place, op, dropped, args, kw)
        return self._effective(module, forward, groups, args, kw)

    def _beside(self, module: nn.Module, forward: Callable[..., Any], place: Place, op: Weighted,
                dropped: list, args: tuple, kw: dict) -> Any:
        """A convolution with chains that drop part of its input: they run beside it."""
        rest = [ts for ts in op.terms if not _drops(ts[0])]
        beside = [(place, Weighted(op.base, rest, held=op.held))]
        out = self._effective(module, forward, beside, args, kw) if rest else \
            self._base(module, forward, args, kw)
        for term, scale in dropped:
            made = convolved(term, module, _first(args, kw))
            out = out + (made if scale == 1 else scale * made)
        return out

    def _trained(self, module: nn.Module, place: Place) -> Tensor | None:
        own = None if place.param in self.providers else module._parameters.get(place.param)
        return place.view(own) if own is not None and own.requires_grad else None

    def _sliced(self, module: nn.Module, groups: list, x: Tensor) -> Tensor:
        """A fused linear: each tuned run of rows is its own product, the rest stays stock."""
        W = self._matrix(module, "weight")
        outs = []
        for (a, b), op in segments(groups, W.shape[0]):
            bias = None if module.bias is None else module.bias[a:b]
            outs.append(F.linear(x, W[a:b], bias) if op is None else linear(x, op, bias))
        return torch.cat(outs, dim=-1)

    def _effective(self, module: nn.Module, forward: Callable[..., Any], groups: list,
                   args: tuple, kw: dict) -> Any:
        """The module's own forward on weights that are made again in backward."""
        by_param: dict[str, list] = {}
        for place, op in groups:
            if any(_drops(t) for t, _ in op.terms):
                raise RecipeError(f"dropout on the input of {place.name} cannot act beside the "
                                  "other parts there: they act on the weight. Set dropout=0, or "
                                  "give the parts different targets")
            by_param.setdefault(place.param, []).append((place, op))
        with ExitStack() as stack:
            for param, items in by_param.items():
                make = functools.partial(self._make_weight, module, param, items)
                reads = [r for _, op in items for r in op.reads(True, True, True)]
                stack.enter_context(self._noted(module, param, make, reads))
            return forward(module, *args, **kw)

    @contextmanager
    def _noted(self, module: nn.Module, param: str, make: Callable[[], Tensor],
               reads: list[Tensor]) -> Iterator[None]:
        """`make()` answers for the parameter; backward makes it again instead of keeping it.

        reads: what `make` reads; changed before backward, it raises.
        """
        value = make()
        call = current()
        if torch.is_grad_enabled():
            again = functools.partial(_in, call, make)
            self.state.tape.note(value, again, (), {}, reads)
        owner, leaf = module, param
        *parents, leaf = param.split(".")
        for p in parents:
            owner = getattr(owner, p)
        expose(owner, leaf)                      # a property answers, in this thread alone
        key = id(owner), leaf
        call.standing[key] = value
        del value
        try:
            yield
        finally:
            call.standing.pop(key, None)

    def _make_weight(self, module: nn.Module, param: str, items: list) -> Tensor:
        stored = self._stored(module, param)
        first = items[0][0]
        if first.rows is None:
            return as_stored(items[0][1].effective(first.view(stored)), first, stored)
        pieces = []
        fused = whole(first).view(stored)
        for (a, b), op in segments(items, fused.shape[-2]):
            rows = fused[..., a:b, :]
            pieces.append(rows if op is None else op.effective(rows))
        return as_stored(torch.cat(pieces, dim=-2), first, stored)


def _drops(term: nn.Module) -> bool:
    """Does a term drop part of its input just now?"""
    return bool(term.training and getattr(term, "dropout", 0))


@torch._dynamo.disable
def _beside(slot: Slot, module: nn.Module, forward: Callable[..., Any], args: tuple,
            kw: dict, why: str) -> Any:
    """A run that stays out of the graph."""
    if why:
        warnings.warn(f"torch.compile: this model runs uncompiled, since {why}", stacklevel=2)
    return slot.run(module, forward, args, kw)


def _in(call: Call, make: Callable[[], Tensor]) -> Tensor:
    """`make()` in a call that may be over."""
    with resume(call):
        return make()


def _first(args: tuple, kw: dict) -> Any:
    """What a module was given, by position or by name."""
    return args[0] if args else next(iter(kw.values()), None)


def slot_of(module: nn.Module, state: State, path: str) -> Slot:
    """The module's slot, made (and the class swapped) on first use."""
    if ATTR not in module._modules:
        module.add_module(ATTR, Slot(state, path).train(module.training))
        if not hasattr(type(module), "_burnish_base"):   # one that only shows weights runs it too
            module.__class__ = tuned_class(type(module))
    return module._modules[ATTR]


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """(path, module, slot) of every touched module."""
    for path, module in list(model.named_modules()):
        slot = module._modules.get(ATTR)
        if isinstance(slot, Slot):
            yield path, module, slot
