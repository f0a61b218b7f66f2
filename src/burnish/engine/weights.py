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

from ..blocks.gpu.coded import Coded
from ..blocks.tape.functions import plainly, transformed
from ..blocks.tape.replay import replay, rng_state
from ..blocks.weight import held_conv
from ..blocks.weight.convolved import convolved
from ..blocks.weight.dropped import drops
from ..blocks.weight.folded import NOTHING
from ..blocks.weight.integer import Grid
from ..blocks.weight.lookup import looked_up
from ..blocks.weight.provided import Weighted, linear
from ..blocks.weight.stacked import Source, Stack, stack
from ..blocks.weight.term import Provider, asks_to_drop
from ..core.call import Call, current, resume
from ..core.errors import RecipeError
from ..core.followed import compiling
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
    stacks: dict[str, Place]
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

    def _coded(self, module: nn.Module, place: Place, like: Tensor) -> Coded | None:
        """What a provider holds of a matrix, where products with such tokens decode it."""
        if place.param not in self.providers or self.absorbed:
            return None
        held = self._modules[self.providers[place.param]].coded(like)
        return None if held is None else place.view(held)

    def _coded_matrix(self, module: nn.Module, param: str, like: Tensor) -> Coded | None:
        if self.absorbed or param not in self.providers:
            return None
        held = self._modules[self.providers[param]].coded(like)
        return held.t() if held is not None and is_conv1d(module) else held

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
            if asks_to_drop(made):
                return f"{part.key} drops at random there, once for all rows"
        if mine and self.state.context:
            return f"{mine[0].key} may read keys of the batch there"
        return "another part reads it" if self.reads else ""

    def product(self, module: nn.Module, active: Any) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) where ``x W^T + b`` is all that a linear does, its weight decoded where it
        is held in another form; None where something is added."""
        if any(self._planned(module, active)) or self.ends is not None:
            return None
        return self._stored(module, "weight"), module.bias

    @property
    def ends(self) -> Provider | None:
        """The provider that holds what this module reads and gives on grids, if one does."""
        return next((p for name in self.providers.values()
                     if (p := self._modules[name]).at_ends), None)

    def grid(self, param: str) -> Grid | None:
        """On which the layer reads its input, where what holds the parameter says one."""
        return self._modules[self.providers[param]].grid if param in self.providers else None

    # -- running ------------------------------------------------------------------------------
    def _answer(self, module: nn.Module, forward: Callable[..., Any], groups: list, args: tuple,
                kw: dict) -> Any:
        """What the module makes of its input, on what answers for its weights."""
        ends = self.ends if self.providers else None
        if ends is not None:
            x = ends.given(first_of(args, kw))
            args, kw = ((x, *args[1:]), kw) if args else ((), {**kw, next(iter(kw)): x})
        out = self._weighted(module, forward, groups, args, kw) if groups else \
            self._base(module, forward, args, kw)
        return out if ends is None else ends.gives(out)

    def _base(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kw: dict) -> Any:
        if self.providers and is_linear(module, forward):
            return self._plain(module, first_of(args, kw))
        if self.providers and self._frozen(module, forward, first_of(args, kw)):
            return self._convolved(module, first_of(args, kw))
        return self._effective(module, forward, [], args, kw)

    def _frozen(self, module: nn.Module, forward: Callable[..., Any], x: Any) -> bool:
        """Is it a convolution that keeps nothing of x, its weight being frozen?"""
        own = module._parameters.get("weight")
        return is_conv(module, forward) and set(self.providers) <= {"weight"} \
            and not (own is not None and own.requires_grad) and held_conv.served(module, x)

    def _convolved(self, module: nn.Module, x: Tensor) -> Tensor:
        """What a convolution makes of x with its frozen weight alone."""
        return held_conv.convolved(module, x, functools.partial(self._stored, module, "weight"),
                                   self._held(module, "weight"))

    def _plain(self, module: nn.Module, x: Tensor) -> Tensor:
        """A linear's own product, by the road that one with something added takes."""
        op = Weighted(functools.partial(self._matrix, module, "weight"), [],
                      held=functools.partial(self._held, module, "weight"),
                      coded=functools.partial(self._coded_matrix, module, "weight"))
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
        if len(groups) == 1 and op.wrap is None and is_conv(module, forward):
            fits = held_conv.served(module, first_of(args, kw))
            if (apart := [ts for ts in op.terms if drops(ts[0]) or fits and ts[0].alongside]):
                return self._beside(module, forward, place, op, apart, args, kw)
        return self._effective(module, forward, groups, args, kw)

    def _beside(self, module: nn.Module, forward: Callable[..., Any], place: Place, op: Weighted,
                apart: list, args: tuple, kw: dict) -> Any:
        """A convolution with updates that run beside it: chains that drop part of its input, and
        those that keep less of it so."""
        rest, x = [ts for ts in op.terms if ts not in apart], first_of(args, kw)
        beside = [(place, Weighted(op.base, rest, held=op.held))]
        out = self._effective(module, forward, beside, args, kw) if rest else \
            self._convolved(module, x) if self._frozen(module, forward, x) else \
            self._base(module, forward, args, kw)
        for term, scale in apart:
            made = term.beside(module, x) if term.alongside else convolved(term, module, x)
            if made is not None:
                out = out + (made if scale == 1 else scale * made)
        return out

    def pairs(self, module: nn.Module, active: Any, part: str, whole: bool = False
              ) -> tuple[Callable[[], Tensor], Tensor | None, Tensor | None]:
        """(what gives the matrix (out, in) of a frozen linear, A (r, in), B (out, r) with B A all
        that is added to it, or None and None), for a listener that answers for it in the name of
        `part`. whole: it may train itself. RecipeError where anything else stands here."""
        groups, before, after = self._planned(module, active)
        found, other = [], before or after or self.reads or len(self.listeners) > 1
        for place, op in groups:
            other = other or place.rows is not None or op.wrap is not None
            for term, scale in op.terms:
                pair = None if term.training and asks_to_drop(term) else term.pair()
                other = other or pair is None
                found.append((pair, scale))
        if other:
            raise RecipeError(f"{part}: {self.path} holds more than low-rank updates without "
                              "dropout (functions of its weight, branches, prompts), which cannot "
                              "be divided among experts: give them different targets")
        if self.ends is not None:
            raise RecipeError(f"{part}: {self.path} reads and gives numbers on a grid, which its "
                              "experts would not; hold its weight in another form")
        if not whole and self._stored(module, "weight").requires_grad:
            raise RecipeError(f"{part}: {self.path} trains whole; it is divided among experts "
                              "frozen: train a low-rank update there instead")
        matrix = functools.partial(self._matrix, module, "weight")
        if not found:
            return matrix, None, None
        scaled = [(A, B if s == 1 else B * s) for (A, B), s in found]
        return (matrix, *(ts[0] if len(ts) == 1 else torch.cat(ts, d)
                          for d, ts in enumerate(zip(*scaled, strict=True))))

    def _trained(self, module: nn.Module, place: Place) -> Tensor | None:
        own = None if place.param in self.providers else module._parameters.get(place.param)
        return place.view(own) if own is not None and own.requires_grad else None

    def _product(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None = None
                 ) -> Tensor:
        """``x V^T + b``, noted where the tape makes products again."""
        tape = self.state.tape
        if compiling() or not tape.notes_products:
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
        """A fused linear: each tuned run of rows is its own product, the rest stays stock; where a
        storage decodes the weight no run keeps what it has decoded."""
        def rows(a: int, b: int) -> Tensor:
            return self._matrix(module, "weight")[a:b]

        held, outs = functools.partial(self._held, module, "weight"), []
        total = module.nf if is_conv1d(module) else module.out_features
        for (a, b), op in segments(groups, total):
            bias = None if module.bias is None else module.bias[a:b]
            if op is None and "weight" in self.providers:
                op = Weighted(functools.partial(rows, a, b), [], held=held)
            outs.append(F.linear(x, rows(a, b), bias) if op is None else linear(x, op, bias))
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
        with ExitStack() as standing:
            for param in dict.fromkeys((*by_param, *self.providers)):
                items = by_param.get(param, [])
                make = functools.partial(self._once, module, param, items) if items else \
                    functools.partial(self._stored, module, param)
                if (made := self._experts(module, param, items, make)) is not None:
                    standing.enter_context(self._standing(module, param, made))
                    continue
                reads = [r for _, op in items for r in op.reads(True, True, True)] if items else \
                    self._held(module, param)
                standing.enter_context(self._noted(module, param, make, reads))
            return forward(module, *args, **kw)

    def _experts(self, module: nn.Module, param: str, items: list, make: Callable[[], Tensor]
                 ) -> Stack | None:
        """What stands for the weights of experts, made one by one as they are multiplied; None
        where they are a tensor: they train whole, or what is added to them has no such form.

        items: what answers for them beside what holds them. make: gives all of them."""
        place = items[0][0] if items else self.stacks.get(param)
        if place is None or place.kind != "experts" or place.rows is not None or transformed() \
                or not _by_expert([op for _, op in items]) \
                or any(p.place.param == param for p in self.absorbed):
            return None
        if param in self.providers:
            provider = self._modules[self.providers[param]]
            matrix, like = provider.matrix, torch.empty(
                0, dtype=provider.dtype, device=next(provider.buffers()).device)
        else:
            like = self._stored(module, param)
            matrix = like.__getitem__
            if like.requires_grad or not isinstance(like, nn.Parameter):
                return None
        terms = [ts for _, op in items for ts in op.terms]
        held = functools.partial(self._held, module, param)
        return stack(Source(place, like, matrix, make, held, terms, self.state.tape))

    @contextmanager
    def _noted(self, module: nn.Module, param: str, make: Callable[[], Tensor],
               reads: list[Tensor]) -> Iterator[None]:
        """`make()` answers for the parameter; backward makes it again instead of keeping it.

        reads: what `make` reads; changed before backward, it raises.
        """
        value = make()
        if torch.is_grad_enabled():
            again = functools.partial(_in, current(), make)
            self.state.tape.note(value, again, (), {}, reads)
        with self._standing(module, param, value):
            del value
            yield

    @contextmanager
    def _standing(self, module: nn.Module, param: str, value: Tensor) -> Iterator[None]:
        """A tensor answers for the parameter, in this thread alone."""
        call = current()
        owner, leaf = module, param
        *parents, leaf = param.split(".")
        for p in parents:
            owner = getattr(owner, p)
        expose(owner, leaf)                      # a property answers
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


def _by_expert(ops: list[Weighted]) -> bool:
    """Is each of these answers one for every expert alone?"""
    return all(op.wrap is None and all(t.by_expert for t, _ in op.terms)
               and not plainly(op.theta()) for op in ops)


def _in(call: Call, make: Callable[[], Tensor]) -> Tensor:
    """`make()` in a call that may be over."""
    with resume(call):
        return make()


def first_of(args: tuple, kw: dict) -> Any:
    """What a module was given, by position or by name."""
    return args[0] if args else next(iter(kw.values()), None)
