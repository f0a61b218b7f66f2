"""Terms beside the task's loss, and how each of them follows the loss's scale.

A training loop multiplies its loss before it goes backward: by 1 / accumulation, by a loss scale,
by a micro-batch's share of the tokens. A term that is to be minimised *with* the loss must get the
same factor, in anybody's loop. That factor is the gradient which arrives at the loss: its *share*.
:class:`Ride` is the identity on the loss; its backward runs first of all, tells the share to
whoever waits for it, and hands it to the terms that ride on the loss.

Three kinds of terms, by what they are made of:

weights alone   :class:`OnWeights`. No graph in forward: the gradient is made in closed form, tensor
                by tensor, when the tensor's own gradient has just been accumulated, so nothing of
                a weight's size waits for backward, and a step inside backward sees the sum.
one forward     a scalar tensor of the run's outputs; it rides on the loss.
an activation   a scalar made where a state passes (a router's balance): :meth:`Riding.on` joins it
                to that state, so it also works inside recomputed blocks.

Where nobody goes backward (zeroth-order steps) the values themselves are collected and added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batches import repeated
from ...core.errors import ConfigError
from ..tape.functions import transformed
from .precise import widened


@dataclass(frozen=True, eq=False)
class OnWeights:
    """A term of weights alone.

    params: the tensors it depends on.  value: the scalar, differentiable in them.
    grads: its gradient in closed form, one per tensor; None takes autograd's.
    """

    params: tuple[nn.Parameter, ...]
    value: Callable[[], Tensor]
    grads: Callable[[], Sequence[Tensor]] | None = None

    def gradients(self) -> Sequence[Tensor | None]:
        """One gradient per tensor of `params`; None for one that does not train just now."""
        if self.grads is not None:
            with torch.no_grad():
                return self.grads()
        wanted = [p for p in self.params if p.requires_grad]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(self.value(), wanted, allow_unused=True))
        return [next(found) if p.requires_grad else None for p in self.params]


class Riding:
    """What the terms of one model share: the share of the backward pass that runs.

    latest: the share of the loss that went backward last.  total: the sum over the losses of this
    backward pass. Both are None outside of one.
    rest: gives the share where no loss was seen: the outputs went into one made elsewhere.
    """

    def __init__(self) -> None:
        self.latest: Tensor | None = None
        self.total: Tensor | None = None
        self.rest: Callable[[], float] = _one
        self.ridden = False                       # some loss went backward since the last update
        self.collected: list[Tensor] | None = None
        self.outside = False                      # the caller will ask for the ride itself
        self.rode = False                         # a term joined an activation in this forward
        self.answers = 1                          # rows that the last forward gave each sample
        self._terms: list[Tensor] = []            # of a forward whose loss is made outside
        self._other: Any = None                   # what stands in place of that loss
        self._due = False                         # and does anybody wait for its share?
        self._portion: Any = None
        self.on_begin: Callable[..., None] | None = None
        self.on_end: Callable[..., Any] | None = None
        self._instead: Callable[..., Tensor] | None = None     # of a forward: the loss, for now
        self.on_share: Callable[[], None] | None = None

    # -- terms on activations -----------------------------------------------------------------
    @property
    def wanted(self) -> bool:
        """Is there any use for a term in this forward?"""
        return self.collected is not None or torch.is_grad_enabled()

    @contextmanager
    def replaced(self, by: Callable[..., Tensor] | None) -> Iterator[None]:
        """Inside, the loss of a forward is ``by(args, keywords, outputs, given)``, whoever makes
        it, at the scale the loss would have had; objectives keep out of it. None: everything is
        itself."""
        before, self._instead = self._instead, by
        try:
            yield
        finally:
            self._instead = before

    def on(self, h: Tensor, term: Tensor, weight: float) -> Tensor:
        """`h`, unchanged; on the way back ``share * weight * d term`` is added."""
        if self.collected is not None:
            self.collected.append(widened(term.detach()) * weight)
            return h
        if self._instead is not None:
            return h
        self.rode = True
        return Attached.apply(h, term, weight, self)

    def share(self) -> Tensor | float:
        return self.rest() if self.latest is None else self.latest

    def asked(self, batch: Any) -> Any:
        """The batch as the loss of the last forward reads it: a sample stands in it as often as it
        was answered (blocks/state/members.py)."""
        n, self.answers = self.answers, 1
        return batch if n == 1 else repeated(batch, n)

    # -- a forward begins ---------------------------------------------------------------------
    def begin(self, args: tuple, kw: dict[str, Any], call: Any) -> None:
        """The model's forward is about to run in this call."""
        if self.on_begin is not None and self._instead is None:
            self.on_begin(args, kw, call)

    # -- the end of a forward -----------------------------------------------------------------
    def end(self, args: tuple, kw: dict[str, Any], out: Any, given: Mapping[str, Any]) -> Any:
        """The outputs of the model's forward, with the loss among them ready to tell its share.
        given: the keys of the batch that were taken off it."""
        if self._instead is not None:
            return self._replace(args, kw, out, given)
        rode, self.rode = self.rode, False
        terms: list[Tensor] = self.on_end(args, kw, out, given) if self.on_end is not None else []
        if self.collected is not None:
            self.collected += [widened(t.detach()) for t in terms]
            return out
        self._due = (rode or self.on_end is not None) and torch.is_grad_enabled()
        if not self._due:
            return out
        if transformed():
            raise ConfigError("an objective rides on backward, which torch.func does not run; "
                              "leave it out, or add its term to your own loss")
        self._terms, self._portion = terms, portion(kw)
        if self.outside:
            return out
        if loss_of(out) is not None:
            return with_loss(out, self.join)
        return on_outputs(out, self, terms) if terms else out

    @contextmanager
    def to_join(self, outside: bool = True) -> Iterator[None]:
        """Around a forward whose caller makes the loss and will :meth:`join` it."""
        before, self.outside = self.outside, outside
        try:
            yield
        finally:
            self.outside = before

    def _replace(self, args: tuple, kw: dict[str, Any], out: Any, given: Mapping[str, Any]) -> Any:
        self._other = self._instead(args, kw, out, given) * portion(kw)      # type: ignore[misc]
        if self.outside:
            return out
        if loss_of(out) is None:
            raise ConfigError("another loss is to be looked at, and this one is made outside of "
                              "the model, unseen: take tuned.backward(batch, loss=...) or "
                              "tuned.step; in fit, no label smoothing")
        return with_loss(out, lambda _: self._other)

    def join(self, loss: Tensor) -> Tensor:
        """The loss of the last forward, unchanged in value; going backward it tells its share and
        takes the terms of that forward along."""
        if self._instead is not None:
            other: Tensor = self._other
            return other
        terms, self._terms = self._terms, []
        due, self._due = self._due, False
        if not (due and isinstance(loss, Tensor) and loss.requires_grad):
            return loss
        return Ride.apply(loss, self, self._portion, *terms)

    def carry(self, share: Tensor) -> None:
        """A loss is going backward with this share."""
        g = share.detach().to(torch.promote_types(share.dtype, torch.float32))
        if self.total is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._over)
        self.latest, self.ridden = g, True
        self.total = g if self.total is None else self.total + g

    def _over(self) -> None:
        self.latest = self.total = None
        if self.on_share is not None:
            self.on_share()

    @contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Inside, terms of a forward give their values instead of their gradients."""
        before, self.collected = self.collected, []
        try:
            yield self.collected
        finally:
            self.collected = before

    # a copied or pickled model has no optimizer, so nobody listens
    def __deepcopy__(self, memo: dict) -> Riding:
        memo[id(self)] = new = Riding()
        return new

    def __reduce__(self) -> tuple:
        return Riding, ()


class Ride(torch.autograd.Function):
    """The identity on a loss; backward tells the share and gives it to the terms."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, riding: Riding, size: float, *terms: Tensor) -> Tensor:
        ctx.riding, ctx.size = riding, size
        ctx.likes = [(t.dtype, t.device) for t in terms]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        whole = isinstance(ctx.size, float) and ctx.size == 1        # then nothing is made
        share = g if whole else g * ctx.size
        ctx.riding.carry(share)
        return g, None, None, *[share.to(dtype=d, device=v) for d, v in ctx.likes]


class Attached(torch.autograd.Function):
    """The identity on `h`; backward adds the gradient of ``share * weight * term`` on the way."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, term: Tensor, weight: float, riding: Riding) -> Tensor:
        ctx.weight, ctx.riding, ctx.like = weight, riding, (term.dtype, term.device)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dtype, device = ctx.like
        share = ctx.riding.share()
        if isinstance(share, Tensor):
            wide = torch.promote_types(share.dtype, dtype)
            own = (share.to(wide) * ctx.weight).to(dtype=dtype, device=device)
            return g, own, None, None
        made = torch.full((), share * ctx.weight, dtype=dtype, device=device)
        return g, made, None, None


def _one() -> float:
    return 1.0


def portion(kw: Mapping[str, Any]) -> Any:
    """How much of an update's loss this forward holds, where its caller says so: transformers
    divides a sum over tokens by ``num_items_in_batch`` of all micro-batches, not a mean by their
    number. 1 elsewhere: then the share that arrives says it."""
    items, labels = kw.get("num_items_in_batch"), kw.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    return (labels != -100).sum() / items


def on_outputs(out: Any, riding: Riding, terms: Sequence[Tensor]) -> Any:
    """The loss is made elsewhere, unseen: terms ride on the first output with a gradient."""
    total = torch.stack([t.float() for t in terms]).sum()

    def join(h: Any) -> Any:
        return riding.on(h, total, 1.0)

    def fits(t: Any) -> bool:
        return isinstance(t, Tensor) and t.requires_grad and t.is_floating_point()

    if fits(out):
        return join(out)
    if isinstance(out, Mapping):
        for key, value in out.items():
            if fits(value):
                out[key] = join(value)             # type: ignore[index]
                return out
    elif isinstance(out, tuple | list):
        for i, value in enumerate(out):
            if fits(value):
                make: Any = getattr(out, "_make", type(out))           # of a named tuple
                return make([*out[:i], join(value), *out[i + 1 :]])
    elif hasattr(out, "__dict__"):
        for key, value in vars(out).items():
            if fits(value):
                if dataclasses.is_dataclass(out):    # it may be frozen
                    return dataclasses.replace(out, **{key: join(value)})    # type: ignore[type-var]
                setattr(out, key, join(value))
                return out
    raise ConfigError("no output of the model carries a gradient, so an objective has nothing to "
                      "ride on")


# -- the loss among a model's outputs -------------------------------------------------------------
def loss_of(out: Any) -> Tensor | None:
    """The scalar loss a model returns, or None."""
    if isinstance(out, Tensor):
        found: Any = out
    elif isinstance(out, Mapping):
        found = out.get("loss")
    elif isinstance(out, tuple) and not hasattr(out, "loss"):
        found = out[0] if out else None
    else:
        found = getattr(out, "loss", None)
    scalar = isinstance(found, Tensor) and not found.dim() and found.is_floating_point()
    return found if scalar else None


def with_loss(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The outputs with ``change(loss)`` in place of their loss; as they are without one."""
    loss = loss_of(out)
    if loss is None or not loss.requires_grad:
        return out
    new = change(loss)
    if isinstance(out, Tensor):
        return new
    if isinstance(out, Mapping):
        out["loss"] = new                          # type: ignore[index]
    elif hasattr(out, "_replace"):
        return out._replace(loss=new)
    elif isinstance(out, tuple):
        return (new, *out[1:])
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        return dataclasses.replace(out, loss=new)
    else:
        out.loss = new
    return out
