"""The objectives of a recipe beside whatever loss goes backward, in anybody's loop.

See ``blocks/update/objective.py`` for the three kinds of terms. Here they are joined to a tuned
model: terms of weights wait at their tensors, terms of a forward ride on the loss the model returns
(or ``tuned.loss`` makes), and where the loss is made elsewhere, terms of weights are added once per
update, when gradients are complete and unscaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..blocks.update.objective import OnWeights
from ..core.batches import size
from ..core.call import giving
from ..core.errors import CheckError, ConfigError
from ..core.method import INPUT, Method

if TYPE_CHECKING:
    from .tuned import Tuned


class Run:
    """One forward of the model, as an objective sees it.

    batch: what the model was called with: keywords as a mapping, or the positional arguments.
    given: the keys of the batch that parts of the recipe read beside it (`Method.context`).
    outputs: what it returned.  taps: module path -> its output, for the paths a method asked for.
    Neither is there ahead of the forward.
    """

    outputs: Any
    taps: dict[str, Any]

    def __init__(self, tuned: Tuned, args: tuple, kw: dict[str, Any], given: Mapping[str, Any],
                 taken: Callable[[], dict[str, Any]]):
        self._tuned, self._args, self._kw = tuned, args, kw
        self.given, self._taken = given, taken
        self._references: dict[Any, tuple[Any, dict[str, Any]]] = {}

    def ended(self, outputs: Any) -> Run:
        """The forward has answered."""
        self.outputs, self.taps = outputs, self._taken()
        return self

    @property
    def batch(self) -> Any:
        if not self._args:
            return self._kw
        return self._args[0] if len(self._args) == 1 and not self._kw else (*self._args, self._kw)

    def reference(self, adapter: str | None = None, rows: Sequence[int] | None = None) -> Any:
        """The outputs of the base (or of another adapter, or of the one that trains as it answers
        in evaluation) on the same batch, or on these samples of it: without gradients, in eval
        mode, computed once."""
        return self._reference(adapter, rows)[0]

    def reference_taps(self, adapter: str | None = None, rows: Sequence[int] | None = None
                       ) -> dict[str, Any]:
        """What `taps` are of this forward, of that one."""
        return self._reference(adapter, rows)[1]

    def _reference(self, adapter: str | None, rows: Sequence[int] | None
                   ) -> tuple[Any, dict[str, Any]]:
        key = adapter, None if rows is None else tuple(rows)
        if key not in self._references:
            args, kw, given = self._args, self._kw, dict(self.given)
            if rows is not None:
                samples = size([*args, *kw.values()])
                args = tuple(_some(v, rows, samples) for v in args)
                kw, given = ({k: _some(v, rows, samples) for k, v in d.items()}
                             for d in (kw, given))
            with torch.no_grad(), _as(self._tuned, adapter), giving(self._tuned.state, given):
                out = self._tuned.model(*args, **kw)
            self._references[key] = out, self._taken()
        return self._references[key]

    def again(self, **given: Any) -> Any:
        """The outputs of the model as it stands on the same batch, run once more with a graph. The
        call is given these keys besides (core/call.py)."""
        with giving(self._tuned.state, {**self.given, **given}):
            return self._tuned.model(*self._args, **self._kw)

    def earlier(self, values: Mapping[str, Tensor]) -> Any:
        """The outputs on the same batch, with these values in place of what trains (by name), in
        evaluation mode and without gradients. A graph that waits for backward stays whole."""
        named = {n: p for n, p in self._tuned.named_parameters() if n in values}
        now = {n: p.data for n, p in named.items()}
        with torch.no_grad(), _as(self._tuned, self._tuned.training), \
                giving(self._tuned.state, dict(self.given)):
            try:
                for n, p in named.items():
                    p.data = values[n]
                out = self._tuned.model(*self._args, **self._kw)
            finally:
                for n, p in named.items():
                    p.data = now[n]
        self._taken()
        return out

    def once_more(self, change: Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]]
                  ) -> tuple[Any, dict[str, Any]]:
        """(outputs, taps) of the model as it stands on what ``change(args, keywords)`` makes of
        the batch, with a graph."""
        args, kw = change(self._args, dict(self._kw))
        with giving(self._tuned.state, dict(self.given)):
            out = self._tuned.model(*args, **kw)
        return out, self._taken()


def _some(value: Any, rows: Sequence[int], samples: int) -> Any:
    """Those samples of an argument that has one entry for each."""
    has = isinstance(value, Tensor) and value.dim() and value.shape[0] == samples
    return value[list(rows)] if has else value


@contextlib.contextmanager
def _as(tuned: Tuned, adapter: str | None) -> Iterator[None]:
    """The model answers as its base, or with another adapter. Nothing is written, so a graph that
    waits for backward stays whole."""
    model, state = tuned.model, tuned.state
    if adapter is not None:
        if adapter not in tuned.adapters:
            raise ConfigError(f"no adapter {adapter!r} to compare with "
                              f"(there is {', '.join(tuned.adapters)})")
        if adapter != state.training and tuned.adapters[adapter].selected:
            raise ConfigError(f"{adapter!r} has base weights of its own, which cannot stand beside "
                              "those that train; compare with the base or with a pure delta")
    training = [m for m in model.modules() if m.training]
    active, rows = state.active, state.rows
    collected, state.riding.collected = state.riding.collected, None
    model.eval()
    try:
        with state.riding.replaced(None):
            if adapter is None:
                with tuned.disabled():
                    yield
            else:
                if adapter != state.training:
                    state.use(((adapter, 1.0),))
                yield
    finally:
        state.riding.collected = collected
        if adapter is not None:
            state.use(active, rows)
        for m in training:
            m.training = True


def _trains(out: Any) -> bool:
    """Does anything that trains reach these outputs?"""
    held = vars(out) if hasattr(out, "__dict__") and not isinstance(out, Tensor | dict) else out
    return any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(held))


class Objectives:
    """The terms of one optimizer's life."""

    def __init__(self, tuned: Tuned, in_backward: bool):
        self.tuned, self.riding, self.in_backward = tuned, tuned.state.riding, in_backward
        methods = [m for m in tuned.recipe if "objective" in m.axes()]
        self.sees_run = [m for m in methods if m.sees_run]
        self.ahead = [m for m in tuned.recipe if type(m).ahead is not Method.ahead]
        self.on_weights = self._static([m for m in methods if not m.sees_run])
        self._term: dict[nn.Parameter, list[OnWeights]] = {}
        for term in self.on_weights:
            for p in term.params:
                self._term.setdefault(p, []).append(term)
        self._made: dict[OnWeights, dict[nn.Parameter, Tensor]] = {}
        self._taps: dict[str, Any] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._term]
        for m in self.sees_run:
            for path in m.taps(tuned.anatomy):
                module = tuned.model.get_submodule(path.removesuffix(INPUT))
                self._hooks.append(module.register_forward_hook(
                    lambda _m, args, kw, out, path=path: self._taps.__setitem__(
                        path, next(iter((*args, *kw.values()))) if path.endswith(INPUT) else out),
                    with_kwargs=True))
        self._busy = False
        self._seen = False                       # a term of a forward has ridden since the update
        riding = self.riding
        riding.ridden = False
        self._run: Run | None = None             # of the forward under way, where it has begun
        riding.on_begin = self._begin if self.ahead else None
        riding.on_end = self._end if methods or self.ahead else None
        riding.on_share = self._made.clear

    def _static(self, methods: list[Method]) -> list[OnWeights]:
        terms = [t for m in methods for t in m.objective(self.tuned, None)]
        if strange := [t for t in terms if not isinstance(t, OnWeights)]:
            raise ConfigError("an objective that does not see the run (sees_run) gives terms of "
                              f"weights as OnWeights, not {type(strange[0]).__name__}")
        return [t for t in terms if any(p.requires_grad for p in t.params)]

    # -- a forward begins -----------------------------------------------------------------------
    def _begin(self, args: tuple, kw: dict[str, Any], call: Any) -> None:
        """What parts want to know before a forward that trains."""
        if self._busy:
            return
        self._run = None
        if not self.riding.wanted:
            return
        run, self._busy = Run(self.tuned, args, kw, call.given, self._taken), True
        try:
            for m in self.ahead:
                call.ahead[m.name] = m.ahead(self.tuned, run)
        finally:
            self._busy = False
        self._run = run

    # -- a forward ends -------------------------------------------------------------------------
    def _end(self, args: tuple, kw: dict[str, Any], out: Any, given: Mapping[str, Any]
             ) -> list[Tensor]:
        """The terms of one forward."""
        if self._busy:
            return []                            # another run of a term: it reads what was tapped
        begun, self._run = self._run, None
        if not self.riding.wanted or not self.sees_run:
            self._taken()
            return []
        self._busy = True                        # a reference runs the model, too
        try:
            run = (begun or Run(self.tuned, args, kw, given, self._taken)).ended(out)
            terms = [(m, list(m.objective(self.tuned, run))) for m in self.sees_run]
        finally:
            self._busy = False
            self._taken()                        # a term may have run a tapped module by itself
        made = [t for _, mine in terms for t in mine]
        if torch.is_grad_enabled() and _trains(out):
            for m, mine in terms:
                if mine and not any(t.requires_grad for t in mine):
                    raise ConfigError(f"{m.name} has nothing to act on: what it is made of depends "
                                      "on nothing that trains here; leave it out, or train "
                                      "something before what it looks at")
        for i, t in enumerate(made):
            if t.requires_grad:
                made[i] = _Notice.apply(t, self)
                break
        return made

    def _taken(self) -> dict[str, Any]:
        """What the last forward has tapped; it is let go."""
        taps, self._taps = self._taps, {}
        return taps

    # -- gradients arrive -------------------------------------------------------------------------
    @torch.no_grad()
    def _arrived(self, p: nn.Parameter) -> None:
        share: Any = self.riding.total
        if share is None:
            if not self.in_backward:
                return                           # at the update, once gradients are complete
            share = self.riding.rest()
        if p.grad is not None:
            self._add(p, share)

    def _add(self, p: nn.Parameter, share: Any) -> None:
        for term in self._term[p]:
            made = self._made.pop(term, None)
            if made is None:
                made = {q: g for q, g in zip(term.params, term.gradients(), strict=True)
                        if g is not None and q.requires_grad}
            if (g := made.pop(p, None)) is not None:
                by = share.to(g.device) if isinstance(share, Tensor) else share
                p.grad.add_((g * by).to(p.grad.dtype))
            if made:                             # the others of this term are still to come
                self._made[term] = made

    @torch.no_grad()
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Once per update: add terms of weights if no loss of ours took them along."""
        ridden, self.riding.ridden = self.riding.ridden, False
        seen, self._seen = self._seen, False
        self._made.clear()
        if getattr(optimizer, "zeroth_order", False):
            return
        if self.sees_run and not seen:
            raise CheckError(
                f"{self.sees_run[0].name} had no part in this update: it rides on the loss that "
                "the model returns, and this loop went backward from another one. Take "
                "tuned.loss(batch, loss=...) or tuned.step, or call the model without labels")
        if ridden or self.in_backward:
            return
        scale = getattr(optimizer, "grad_scale", None)         # a fused step unscales by itself
        for p in self._term:
            if p.requires_grad and p.grad is not None:
                self._add(p, 1.0 if scale is None else scale)
        self._made.clear()

    def close(self) -> None:
        for h in self._hooks:
            h.remove()
        self._hooks.clear()
        self.riding.on_begin = self.riding.on_end = self.riding.on_share = None


class _Notice(torch.autograd.Function):
    """The identity that remembers its backward: a term that never ran must not pass unseen."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, owner: Objectives) -> Tensor:
        ctx.owner = owner
        return t.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.owner._seen = True
        return g, None
