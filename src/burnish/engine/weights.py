"""How a tuned module runs on its weights: what answers for each, planned, made, and read again.

A plain linear is one function of base and terms (blocks/weight/provided.py), a fused one a function
per tuned run of rows. Everything else runs its own forward on the effective weight, which backward
makes again instead of keeping it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.tape.replay import replay, rng_state
from ..blocks.weight.convolved import convolved
from ..blocks.weight.dropped import drops
from ..blocks.weight.folded import NOTHING
from ..blocks.weight.lookup import looked_up
from ..blocks.weight.provided import Weighted, linear
from ..core.call import Call, current, resume
from ..core.errors import RecipeError
from ..core.site import Place
from .layout import is_conv, is_conv1d, is_linear, segments, whole
from .planned import Plan, make_plan
from .starts import with_starts
from .state import Part, State
from .swap import expose


class Weights(nn.Module):
    """The part of a :class:`~burnish.engine.slot.Slot` that answers for its module's weights."""

    state: State
    parts: list[Part]
    providers: dict[str, str]
    absorbed: list[Part]
    reads: set[tuple[str, str]]
    _plans: tuple[int, dict[Any, Any]]
    _rows: tuple[int, dict[Any, Any]]

    def module_of(self, part: Part) -> nn.Module:
        return self._modules[part.adapter][part.key]

    # -- planning -----------------------------------------------------------------------------
    def _planned(self, module: nn.Module, active: Any) -> Plan:
        version, made = self._plans
        if version != self.state.version:
            self._plans = version, made = self.state.version, {}
        if active not in made:
            made[active] = make_plan(self, module, active)
        return made[active]

    # -- reading ------------------------------------------------------------------------------
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
            read = [self._modules[self.providers[param]],
                    *(self.module_of(p) for p in self.absorbed if p.place.param == param)]
            return [b for m in read for b in m.buffers()]
        stored = self._stored(module, param)
        return [stored] if isinstance(stored, nn.Parameter) else []

    def _place_view(self, module: nn.Module, place: Place) -> Tensor:
        return place.view(self._stored(module, place.param))

    def _matrix(self, module: nn.Module, param: str) -> Tensor:
        w = self._stored(module, param)
        return w.t() if is_conv1d(module) else w

    def together(self, active: Any = None) -> str:
        """Why the rows that this module is given must run as one, or "". active: the adapters that
        count; None: all."""
        mine = [p for p in self.parts if p.place or p.branch]
        if active is not None:
            mine = [p for p in mine if dict(active).get(p.adapter)]
        for part in mine:
            made = self.module_of(part)
            if part.branch is not None:
                return f"{part.key} adds to its hidden state"
            if getattr(made, "dropout", 0) or getattr(made, "drop_path", 0):
                return f"{part.key} drops at random there, once for all rows"
        if mine and self.state.context:
            return f"{mine[0].key} may read keys of the batch there"
        return "another part reads it" if self.reads else ""

    def product(self, module: nn.Module, active: Any) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) where ``x W^T + b`` is all that a linear does, its weight decoded where it
        is held in another form; None where something is added."""
        if any(self._planned(module, active)):
            return None
        return self._stored(module, "weight"), module.bias

    # -- running ------------------------------------------------------------------------------
    def _base(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        if self.providers and is_linear(module, forward):
            return self._plain(module, first_of(args, kw))
        with ExitStack() as stack:
            for param in self.providers:
                make = functools.partial(self._stored, module, param)
                stack.enter_context(self._noted(module, param, make, self._held(module, param)))
            return forward(module, *args, **kw)

    def _plain(self, module: nn.Module, x: Tensor) -> Tensor:
        """A linear's own product, by the road that one with something added takes."""
        op = Weighted(functools.partial(self._matrix, module, "weight"), [],
                      held=functools.partial(self._held, module, "weight"))
        own = None if self.providers else module._parameters.get("weight")
        trained = own is not None and own.requires_grad
        weight = self._matrix(module, "weight") if trained else None
        return self._product(x, op, module.bias, weight)

    def _weighted(self, module: nn.Module, forward: Callable[..., Any], groups: list,
                  args: tuple, kw: dict) -> Any:
        place, op = groups[0]
        if is_linear(module, forward) and all(p.param == "weight" for p, _ in groups):
            if len(groups) == 1 and place.rows is None:
                return self._product(first_of(args, kw), op, module.bias,
                                     self._trained(module, place))
            if place.rows is not None and all(p.rows for p, _ in groups):
                return self._sliced(module, groups, first_of(args, kw))
        if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward \
                and len(groups) == 1 and (op.wrap is None or op.wrap.diagonal):
            return looked_up(first_of(args, kw), op, functools.partial(forward, module),
                             module.padding_idx, op.held())
        if len(groups) == 1 and op.wrap is None and is_conv(module, forward) \
                and (dropped := [ts for ts in op.terms if drops(ts[0])]):
            return self._beside(module, forward, place, op, dropped, args, kw)
        return self._effective(module, forward, groups, args, kw)

    def _beside(self, module: nn.Module, forward: Callable[..., Any], place: Place, op: Weighted,
                dropped: list, args: tuple, kw: dict) -> Any:
        """A convolution with chains that drop part of its input: they run beside it."""
        rest = [ts for ts in op.terms if not drops(ts[0])]
        beside = [(place, Weighted(op.base, rest, held=op.held))]
        out = self._effective(module, forward, beside, args, kw) if rest else \
            self._base(module, forward, args, kw)
        for term, scale in dropped:
            made = convolved(term, module, first_of(args, kw))
            out = out + (made if scale == 1 else scale * made)
        return out

    def _trained(self, module: nn.Module, place: Place) -> Tensor | None:
        own = None if place.param in self.providers else module._parameters.get(place.param)
        return place.view(own) if own is not None and own.requires_grad else None

    def _product(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None = None
                 ) -> Tensor:
        """``x V^T + b``, noted where the tape makes products again."""
        tape = self.state.tape
        if torch.compiler.is_compiling() or not tape.notes_products:
            return linear(x, op, bias, weight)
        states = rng_state(x.device) if any(drops(t) for t in op.all) else None
        y = linear(x, op, bias, weight)
        call = current()

        def again(x: Tensor) -> Tensor:
            with resume(call), nullcontext() if states is None else replay(x.device, states):
                return linear(x, op, bias, weight)

        tape.note(y, again, (x,), {}, [*op.reads(True, True, True),
                                       *[t for t in (weight, bias) if t is not None]],
                  product=True)
        return y

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
            if any(drops(t) for t, _ in op.terms):
                raise RecipeError(f"dropout on the input of {place.name} cannot act beside the "
                                  "other parts there: they act on the weight. Set dropout=0, or "
                                  "give the parts different targets")
            by_param.setdefault(place.param, []).append((place, op))
        with ExitStack() as stack:
            for param, items in by_param.items():
                make = functools.partial(self._once, module, param, items)
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

    def _once(self, module: nn.Module, param: str, items: list) -> Tensor:
        """The effective weight; evaluation keeps it where there is room."""
        def size() -> int:
            stored = self._stored(module, param)
            return stored.numel() * stored.element_size()

        make = functools.partial(self._make_weight, module, param, items)
        fold, held = items[0][1].whole, items[0][1].held()
        made = NOTHING if fold is None or not held else fold.now([op for _, op in items], held[0])
        if made is NOTHING:
            return make()
        kept = made.large("weight", made.small("bytes", size), make)
        return make() if kept is None else kept

    def _make_weight(self, module: nn.Module, param: str, items: list) -> Tensor:
        stored = self._stored(module, param)
        first = items[0][0]
        if first.rows is None:
            return first.unview(items[0][1].effective(first.view(stored)), stored)
        pieces = []
        fused = whole(first).view(stored)
        for (a, b), op in segments(items, fused.shape[-2]):
            rows = fused[..., a:b, :]
            pieces.append(rows if op is None else op.effective(rows))
        return first.unview(torch.cat(pieces, dim=-2), stored)


def _in(call: Call, make: Callable[[], Tensor]) -> Tensor:
    """`make()` in a call that may be over."""
    with resume(call):
        return make()


def first_of(args: tuple, kw: dict) -> Any:
    """What a module was given, by position or by name."""
    return args[0] if args else next(iter(kw.values()), None)
