"""What is added to one module, and how that module then runs.

A touched module keeps its identity: its class becomes a subclass of the same name, its
parameters keep their names, and one child, ``module.burnish``, owns everything added::

    inputs -> branches at the input -> the module's own forward on its effective weights
           -> branches at the output -> outputs
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..blocks.tape.executor import MODES
from ..blocks.tape.saved import Tape
from ..blocks.weight.convolved import convolved
from ..blocks.weight.provided import Provider, Weighted, Wrap, linear
from ..core.errors import RecipeError
from ..core.site import Branch, Place
from .layout import as_stored, is_conv, is_conv1d, is_linear, segments, whole
from .swap import ATTR, tuned_class


@dataclass
class State:
    """What all slots of one model share."""

    tape: Tape = field(default_factory=Tape)
    active: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None      # one adapter per sample
    off: bool = False
    version: int = 0                                 # grows when `active` or the parts change
    box: dict[tuple[str, str], Any] = field(default_factory=dict)
    readers: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # tap -> adapters

    def use(self, active: tuple[tuple[str, float], ...],
            rows: tuple[str | None, ...] | None = None) -> None:
        self.active, self.rows, self.version = active, rows, self.version + 1


@dataclass
class Part:
    """A term on a place of this module, or a branch that reads and writes here."""

    adapter: str
    key: str
    place: Place | None = None
    branch: Branch | None = None


class Slot(nn.Module):
    """Everything burnish adds to one module. Children: one container per adapter."""

    def __init__(self, state: State, path: str):
        super().__init__()
        self.__dict__["state"] = state
        self.path = path
        self.parts: list[Part] = []
        self.providers: dict[str, str] = {}          # parameter -> child name
        self.standing: dict[str, Tensor] = {}        # what answers for a parameter just now
        self.mode: str | None = None
        self.root = False
        self.reads: set[tuple[str, str]] = set()     # taps other slots want from here
        self.listeners: list[Callable[..., Any]] = []  # around the forward, outermost first
        self._plan: tuple[Any, Any] | None = None

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
        for names in self.state.readers.values():
            names[:] = [n for n in names if n != adapter]
        self.state.version += 1

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
        if self.root and not state.tape._depth:
            return self._run_root(module, forward, args, kw)
        call = functools.partial(self._inside, module, forward)
        for listener in self.listeners:
            call = functools.partial(listener, module, call)
        if self.mode and not state.off:
            return MODES[self.mode](module, call, args, kw, state.tape.recording)
        return call(*args, **kw)

    def _run_root(self, module: nn.Module, forward: Callable[..., Any], args: tuple,
                  kw: dict) -> Any:
        state = self.state
        state.box.clear()
        if state.rows is not None:
            batch = next(v.shape[0] for v in pytree.tree_leaves((args, kw))
                         if isinstance(v, Tensor) and v.dim())
            if batch != len(state.rows):
                raise RecipeError(f"use([...]) names {len(state.rows)} adapters for a batch of "
                                  f"{batch}; give one per sample")
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            # the fused encoder layer reads weights past their modules; ours would be ignored
            torch.backends.mha.set_fastpath_enabled(False)
            with state.tape.recording():
                return self.run(module, forward, args, kw)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            state.box.clear()

    def _inside(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        state = self.state
        if state.off:
            return self._base(module, forward, args, kw)
        if state.rows is not None and self.parts:
            return self._per_sample(module, forward, args, kw)
        return self._active(module, forward, state.active, args, kw)

    def _per_sample(self, module: nn.Module, forward: Callable[..., Any], args: tuple,
                    kw: dict) -> Any:
        """Each sample through its own adapter: the batch is split, run and put together."""
        batch = len(self.state.rows)
        order, outs = [], []
        for name in dict.fromkeys(self.state.rows):
            index = torch.tensor([i for i, r in enumerate(self.state.rows) if r == name])
            order.append(index)

            def pick(v: Any, index: Tensor = index) -> Any:
                if not isinstance(v, Tensor) or not v.dim() or v.shape[0] % batch or not v.shape[0]:
                    return v
                per = v.shape[0] // batch
                return v.view(batch, per, *v.shape[1:])[index.to(v.device)].flatten(0, 1) \
                    if per > 1 else v[index.to(v.device)]

            a, k = pytree.tree_map(pick, (args, kw))
            active = () if name is None else ((name, 1.0),)
            outs.append(self._active(module, forward, active, a, k))
        back = torch.cat(order).argsort()

        def join(*parts: Any) -> Any:
            if not isinstance(parts[0], Tensor):
                return parts[0]
            whole = torch.cat(parts)
            per = whole.shape[0] // batch
            where = back.to(whole.device)
            if per > 1:
                return whole.view(batch, per, *whole.shape[1:])[where].flatten(0, 1)
            return whole[where]

        return pytree.tree_map(join, *outs)

    def _active(self, module: nn.Module, forward: Callable[..., Any],
                active: tuple[tuple[str, float], ...], args: tuple, kw: dict) -> Any:
        groups, before, after = self._planned(module, active)
        given = _first(args, kw)
        self._tap("input", given, active)
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
                    seen = self._seen(path, what)
                first = self._branch(part, scale, seen, first)
            out = (first, *out[1:]) if isinstance(out, tuple) else first
        self._tap("output", out[0] if isinstance(out, tuple) else out, active)
        return out

    def _tap(self, what: str, value: Any, active: tuple[tuple[str, float], ...]) -> None:
        """Keep a state for the branches elsewhere that read it, until the last one has."""
        if (self.path, what) in self.reads:
            wanted = dict(active)
            n = sum(bool(wanted.get(a)) for a in self.state.readers.get((self.path, what), ()))
            if n:
                self.state.box[self.path, what] = [value, n]

    def _seen(self, path: str, what: str) -> Any:
        entry = self.state.box[path, what]
        entry[1] -= 1
        if not entry[1]:
            del self.state.box[path, what]
        return entry[0]

    def _branch(self, part: Part, scale: float, seen: Tensor, h: Tensor) -> Tensor:
        made = self.module_of(part)(seen)
        if part.branch.compose == "replace":
            return made if scale == 1 else h + scale * (made - h)
        return h + (made if scale == 1 else scale * made)

    def _base(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        if self.providers and is_linear(module, forward):
            op = Weighted(functools.partial(self._matrix, module, "weight"), [])
            return linear(_first(args, kw), op, module.bias)
        with ExitStack() as stack:
            for param, child in self.providers.items():
                stack.enter_context(self._noted(module, param, self._modules[child].weight))
            return forward(module, *args, **kw)

    # -- weights ------------------------------------------------------------------------------
    def _planned(self, module: nn.Module, active: Any) -> tuple[list, list, list]:
        key = (self.state.version, active)
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, self._make_plan(module, active))
        return self._plan[1]

    def _make_plan(self, module: nn.Module, active: Any) -> tuple[list, list, list]:
        weights = dict(active)
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
            ops.append((place, Weighted(base, terms, wraps[0] if wraps else None)))
        return ops, before, after

    def _stored(self, module: nn.Module, param: str) -> Tensor:
        if param in self.providers:
            return self._modules[self.providers[param]].weight()
        *parents, leaf = param.split(".")
        for p in parents:
            module = getattr(module, p)
        own = module._parameters.get(leaf)
        return own if own is not None else getattr(module, leaf)

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
        out = self._effective(module, forward, [(place, Weighted(op.base, rest))], args, kw) \
            if rest else self._base(module, forward, args, kw)
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
                stack.enter_context(self._noted(module, param, make))
            return forward(module, *args, **kw)

    @contextmanager
    def _noted(self, module: nn.Module, param: str, make: Callable[[], Tensor]) -> Iterator[None]:
        """`make()` answers for the parameter; backward makes it again instead of keeping it."""
        value = make()
        if torch.is_grad_enabled():
            self.state.tape.note(value, make, (), {})
        owner, leaf = module, param
        if param in self.providers:              # a property answers: it looks here first
            self.standing[param] = value
        else:
            *parents, leaf = param.split(".")
            for p in parents:
                owner = getattr(owner, p)
            owner.__dict__[leaf] = value         # found before nn.Module looks at _parameters
        del value
        try:
            yield
        finally:
            self.standing.pop(param, None)
            owner.__dict__.pop(leaf, None)

    def answer(self, module: nn.Module, param: str) -> Tensor:
        """What ``module.<param>`` is when a provider holds it."""
        value = self.standing.get(param)
        return self._stored(module, param) if value is None else value

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


def _first(args: tuple, kw: dict) -> Any:
    """What a module was given, by position or by name."""
    return args[0] if args else next(iter(kw.values()), None)


def slot_of(module: nn.Module, state: State, path: str) -> Slot:
    """The module's slot, made (and the class swapped) on first use."""
    if ATTR not in module._modules:
        module.add_module(ATTR, Slot(state, path).train(module.training))
        module.__class__ = tuned_class(type(module))
    return module._modules[ATTR]


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """(path, module, slot) of every touched module."""
    for path, module in list(model.named_modules()):
        slot = module._modules.get(ATTR)
        if isinstance(slot, Slot):
            yield path, module, slot
