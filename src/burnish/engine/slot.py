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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.tape.executor import MODES, in_graph
from ..blocks.weight.term import Provider
from ..core.call import Call, again, call_of, resume
from ..core.errors import ConfigError, RecipeError
from ..core.followed import beside_graph, compiling
from ..core.site import Branch, Place
from .layout import is_linear
from .planned import Plan
from .rows import TOGETHER, add_grouped, check_rows, rows_of, split
from .state import Part, State
from .swap import ATTR, PROVIDED, tuned_class
from .weights import Weights, first_of


class Slot(Weights):
    """Everything burnish adds to one module. Children: one container per adapter."""

    def __init__(self, state: State, path: str):
        super().__init__()
        self.__dict__["state"] = state
        self.path = path
        self.parts: list[Part] = []
        self.providers: dict[str, str] = {}          # parameter -> child name
        self.stacks: dict[str, Place] = {}           # those of them that are stacks of experts
        self.stored_by: dict[str, str] = {}          # parameter -> the storage that made it
        self.absorbed: list[Part] = []               # starts that a provider holds subtracted
        self.shells: dict[str, nn.Parameter] = {}    # parameters that a provider answers for
        self.mode: str | None = None
        self.root = False
        self.reads: set[tuple[str, str]] = set()     # taps other slots want from here
        self.listeners: list[Callable[..., Any]] = []  # around the forward, outermost first
        self._plans: tuple[int, dict[Any, Any]] = (-1, {})     # of one version, by what is active
        self.now: Plan = ([], [], [])                # of what is active, while `state.ready`
        self._rows: tuple[int, dict[Any, Any]] = (-1, {})      # the same by the batch's adapters

    def forward(self, *args: Any, **kw: Any) -> Any:
        """Nobody's: raises ConfigError, where a module runs whatever is registered in it."""
        where = f"the module {self.path!r}" if self.path else "this model"
        raise ConfigError(f"{where} runs each module that is registered in it, and what burnish "
                          "has added is registered there: tune the module inside it that learns "
                          "(of a SentenceTransformer model[0].auto_model)")

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
        self.state.changed()
        return name

    def train(self, mode: bool = True) -> Slot:
        if self.state is not None:
            self.state.room.clear()              # see blocks/weight/folded.py
        return super().train(mode)

    def provide(self, place: Place, provider: Provider) -> None:
        param = place.param
        name = PROVIDED + param.replace(".", "_")
        self.add_module(name, provider)
        self.providers[param] = name
        if place.kind == "experts":
            self.stacks[param] = place
        self.state.changed()

    def drop(self, adapter: str) -> None:
        self._modules.pop(adapter, None)
        self.parts = [p for p in self.parts if p.adapter != adapter]
        self.absorbed = [p for p in self.absorbed if p.adapter != adapter]
        for readers in self.state.readers.values():
            readers[:] = [p for p in readers if p.adapter != adapter]
        self.state.changed()
        self.state.gone[adapter] = self.state.version
        self.state.context.pop(adapter, None)
        self.state.listening[:] = [a for a in self.state.listening if a != adapter]

    def beside(self, place: Place) -> list[tuple[Place, nn.Module]]:
        """(place, term) of everything that stands on the parameter of a place."""
        return [(p.place, self.module_of(p)) for p in self.parts
                if p.place is not None and p.place.param == place.param]

    @property
    def idle(self) -> bool:
        """Nothing left to do here."""
        return not (self.parts or self.providers or self.mode or self.root or self.reads
                    or self.listeners)

    # -- running ------------------------------------------------------------------------------
    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        state = self.state
        if compiling():
            return self._traced(module, forward, args, kw)
        call = call_of(state)
        if call is None:
            return self._outermost(module, forward, args, kw)
        if not self.listeners and (not self.mode or call.off):
            return self._inside(module, forward, call, args, kw)

        def run(*args: Any, **kw: Any) -> Any:       # backward may ask again, in another call
            return self._inside(module, forward, call_of(state), args, kw)

        for listener in self.listeners:
            if not getattr(listener, "outside", False):
                run = functools.partial(listener, module, run)
        if self.mode and not call.off:
            run = functools.partial(self._moded, module, run)
        for listener in self.listeners:
            if getattr(listener, "outside", False):
                run = functools.partial(listener, module, run)
        return run(*args, **kw)

    def _moded(self, module: nn.Module, run: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        assert self.mode is not None
        return MODES[self.mode](module, run, args, kw, self.state.tape)

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
            check_rows(state, call.rows, args, kw)
        if self.root and not call.off:
            state.riding.begin(args, kw, call)
        with again(call, state.loose(self.root)), state.tape.recording(state.watched):
            out = self.run(module, forward, args, kw)
        return state.riding.end(args, kw, out, call.given) if self.root and not call.off else out

    def _traced(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        """In a graph that is compiled. The compiler decides what is kept, so there is no tape; the
        facts of the call are constants of the graph, which its guards watch. What a graph cannot
        hold (listeners, taps, weights that stand in for others) runs as it is, beside it.

        Which adapter is active is no such fact: the graph reads the plan that stands in `now`, and
        another of the same shapes there needs no other graph."""
        state = self.state
        why = state.beside if self.root else ""
        plan = self.now if state.ready else self._planned(module, state.active)
        if why or not self._graphable(module, forward, plan):
            return _beside(self, module, forward, args, kw, why)
        call = Call(state)
        if self.mode == "checkpoint" and torch.is_grad_enabled():
            return in_graph(lambda *a, **k: self._by(plan, module, forward, call, a, k), args, kw)
        return self._by(plan, module, forward, call, args, kw)

    def _graphable(self, module: nn.Module, forward: Callable[..., Any], plan: Plan) -> bool:
        state = self.state
        if state.off_here or state.by_rows or self.listeners or self.reads \
                or self.mode not in (None, "checkpoint"):
            return False
        return not (plan[0] or self.providers) or is_linear(module, forward)

    def _inside(self, module: nn.Module, forward: Callable[..., Any], call: Call, args: tuple,
                kw: dict) -> Any:
        if call.off:
            return self._answer(module, forward, [], args, kw)
        if call.rows is not None:
            return self._per_sample(module, forward, call, args, kw)
        return self._active(module, forward, call, args, kw)

    def _per_sample(self, module: nn.Module, forward: Callable[..., Any], call: Call,
                    args: tuple, kw: dict) -> Any:
        """Each sample through its own adapter: together where they are chains on a linear, else
        the batch is split, run and put together."""
        plan = rows_of(self, module, forward, call.rows)
        keys = plan.now

        def run(name: str | None, a: tuple, k: dict, valid: Any, given: dict) -> Any:
            n = keys.count(name)
            if name == TOGETHER:
                y = self._plain(module, first_of(a, k))
                return add_grouped(plan.grouped, first_of(a, k), y, n)
            own = replace(call, active=() if name is None else ((name, 1.0),), rows=None,
                          valid=valid, given=given,
                          samples=tuple(s // len(keys) * n for s in call.samples
                                        if not s % len(keys)))
            with resume(own):
                return self._active(module, forward, own, a, k)

        if not any(keys):                            # nothing here for any of them
            return self._active(module, forward, call, args, kw)
        if keys.count(TOGETHER) == len(keys):
            return run(TOGETHER, args, kw, call.valid, {})
        return split(keys, run, args, kw, call.valid, dict(call.given))

    def _active(self, module: nn.Module, forward: Callable[..., Any], call: Call, args: tuple,
                kw: dict) -> Any:
        return self._by(self._planned(module, call.active), module, forward, call, args, kw)

    def _by(self, plan: Plan, module: nn.Module, forward: Callable[..., Any], call: Call,
            args: tuple, kw: dict) -> Any:
        groups, before, after = plan
        if groups and not (before or after or self.reads):
            return self._answer(module, forward, groups, args, kw)
        given = first_of(args, kw)
        self._tap("input", given, call)
        for part, own, scale in before:
            x = first_of(args, kw)
            path, what = part.branch.read
            seen = x if path in ("", self.path) else self._seen(path, what, part, call)
            made = _branch(part, own, scale, seen, x)
            args, kw = ((made, *args[1:]), kw) if args else ((), {**kw, next(iter(kw)): made})
        out = self._answer(module, forward, groups, args, kw)
        if after:
            first = out[0] if isinstance(out, tuple) else out
            for part, own, scale in after:
                path, what = part.branch.read
                if path in ("", self.path):
                    seen = first if what == "output" else given
                else:
                    seen = self._seen(path, what, part, call)
                first = _branch(part, own, scale, seen, first)
            out = (first, *out[1:]) if isinstance(out, tuple) else first
        self._tap("output", out[0] if isinstance(out, tuple) else out, call)
        return out

    def _tap(self, what: str, value: Any, call: Call) -> None:
        """Keep a state for the branches elsewhere that read it, until the last one has."""
        if (self.path, what) in self.reads:
            wanted = dict(call.active)
            n = sum(bool(wanted.get(p.adapter, 0.0) * p.damp)
                    for p in self.state.readers.get((self.path, what), ()))
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


def _branch(part: Part, own: nn.Module, scale: float, seen: Tensor, h: Tensor) -> Tensor:
    made = own(_tokens(seen, h))
    if part.branch.compose == "replace":
        return made if scale == 1 else h + scale * (made - h)
    if part.branch.compose == "blend":
        made = made - own.scale * h
    return h + (made if scale == 1 else scale * made)


def _tokens(seen: Tensor, h: Tensor) -> Tensor:
    """A map (B, C, height, width) as (B, tokens, C) where h consists of such tokens: an attention
    that is given a picture ends in a linear of its tokens."""
    pictured = seen.dim() == 4 and h.dim() == 3 and len(seen) == len(h) \
        and seen.shape[2] * seen.shape[3] == h.shape[1]
    return seen.flatten(2).mT if pictured else seen


@torch._dynamo.disable
def _beside(slot: Slot, module: nn.Module, forward: Callable[..., Any], args: tuple,
            kw: dict, why: str) -> Any:
    """A run that stays out of the graph."""
    if why:
        if not torch.compiler.is_exporting():
            warnings.warn(f"torch.compile: this model runs uncompiled, since {why}", stacklevel=2)
    with beside_graph():
        return slot.run(module, forward, args, kw)


def slot_of(module: nn.Module, state: State, path: str) -> Slot:
    """The module's slot, made (and the class swapped) on first use."""
    if ATTR not in module._modules:
        module.add_module(ATTR, Slot(state, path).train(module.training))
        if not hasattr(type(module), "_burnish_base"):   # one that only shows weights runs it too
            module.__class__ = tuned_class(type(module))
    return module._modules[ATTR]


def settle(model: nn.Module, state: State) -> None:
    """Let every slot hold the plan of what is active, for compiled graphs to read."""
    try:
        for _, module, slot in slots(model):
            slot.now = slot._planned(module, state.active)
    except RecipeError:                              # a forward will say so
        return
    state.ready = True


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """(path, module, slot) of every touched module."""
    for path, module in list(model.named_modules()):
        slot = module._modules.get(ATTR)
        if isinstance(slot, Slot):
            yield path, module, slot
