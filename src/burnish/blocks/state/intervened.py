"""Attention whose answer is another model's for a while, and is pulled to it.

Of every attention of a forward that has read the other one before (`Signals`, from
``context().ahead``), with its own output y = o(c), c = P v, P = softmax(S), S = q k^T / sqrt(h):

    mode        goes on                       reads without a gradient
    "output"    the other's y                 q, k, v
    "context"   o(the other's c)              q, k, v
    "map"       o(the other's P v)            q, k
    None        y

and ``maps mean (S - S')^2 + outputs mean (y - y')^2`` is added to the loss, y the own output from
what the mode's last column says (of "map": what goes on); scores of what is masked count as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import call_of
from ...core.errors import RecipeError
from .attending import Attending, named, watched
from .prompts import Listener


@dataclass
class Signals:
    """What one forward gave in each attention, by its path: scores (B, H, T, T) as the softmax read
    them but for the mask, what the last linear read, what it gave."""

    mode: str | None
    scores: dict[str, Tensor] = field(default_factory=dict)
    context: dict[str, Tensor] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)


def scores(given: Mapping[str, Any]) -> Tensor:
    """``q k^T`` times the scale, of the arguments of ``F.scaled_dot_product_attention``."""
    q, k = given["query"], given["key"]
    scale = given.get("scale")
    return q @ _repeated(k, q).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)


def _repeated(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values of fewer heads, one for every query's."""
    n = q.shape[-3] // t.shape[-3]
    return t if n == 1 else t.repeat_interleave(n, -3)


def masked(S: Tensor, given: Mapping[str, Any], fill: float) -> Tensor:
    """The scores with `fill` where a query does not see a key."""
    mask = given.get("attn_mask")
    if mask is not None:
        S = S.masked_fill(~mask if mask.dtype == torch.bool else mask < -9999.0, fill)
    if given.get("is_causal"):
        seen = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).tril()
        S = S.masked_fill(~seen, fill)
    return S


@contextmanager
def read(model: nn.Module, outs: Mapping[str, str], into: Signals) -> Iterator[None]:
    """Inside, a forward's signals are written down. outs: attention -> its last linear."""
    def last(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kw: dict[str, Any], out: Tensor) -> None:
            into.context[path] = (args[0] if args else next(iter(kw.values()))).detach()
            into.output[path] = out.detach()
        return hook

    def told(path: str, given: dict[str, Any]) -> None:
        into.scores[path] = scores(given).detach()

    hooks = [model.get_submodule(out).register_forward_hook(last(path), with_kwargs=True)
             for path, out in outs.items()]
    try:
        with watched(model, outs, told):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Led(Listener):
    """path: of the attention.  part: the name of the method that has read ahead."""

    what = "an intervention"

    def __init__(self, state: Any, adapter: str, part: str, path: str):
        super().__init__(state, adapter)
        self.part, self.path = part, path

    @property
    def signals(self) -> Signals | None:
        """Of this forward; None where it does not train."""
        call = call_of(self.state)
        return None if call is None else call.ahead.get(self.part)


class Unheard(_Led):
    """A linear that reads without a gradient in some modes."""

    def __init__(self, state: Any, adapter: str, part: str, path: str, modes: tuple[str, ...]):
        super().__init__(state, adapter, part, path)
        self.modes = modes

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        led = self.signals
        if led is None or led.mode not in self.modes:
            return call(*args, **kw)
        return call(*(a.detach() if isinstance(a, Tensor) else a for a in args),
                    **{k: v.detach() if isinstance(v, Tensor) else v for k, v in kw.items()})


class Led(_Led, Attending):
    """An attention whose scores are compared, and whose map may be the other's."""

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        led = self.signals
        if led is None:
            return func(*args, **kwargs)
        given = named(args, kwargs)
        theirs = led.scores.get(self.path)
        S = scores(given)
        if theirs is None or theirs.shape != S.shape:
            raise RecipeError(f"{self.part}: {self.path} does not attend as the base's does, token "
                              "by token; leave out the part that adds keys or tokens")
        wide = torch.promote_types(S.dtype, torch.float32)
        self.here.box[self.part, self.path] = F.mse_loss(
            masked(S.to(wide), given, 0.0), masked(theirs.to(wide), given, 0.0))
        if led.mode != "map":
            return func(*args, **kwargs)
        mask = given.get("attn_mask")
        theirs = theirs.to(wide)
        if mask is not None and mask.dtype != torch.bool:
            theirs = theirs + mask
        P = masked(theirs, given, float("-inf")).softmax(-1)
        return P.to(S.dtype) @ _repeated(given["value"], given["query"])


class Answer(_Led):
    """The last linear of an attention, with what goes on."""

    def __init__(self, state: Any, adapter: str, part: str, path: str, maps: float, outputs: float):
        super().__init__(state, adapter, part, path)
        self.maps, self.outputs = maps, outputs

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        led, own = self.signals, call(*args, **kw)
        if led is None:
            return own
        theirs = led.output[self.path]
        wide = torch.promote_types(own.dtype, torch.float32)
        term = self.maps * self.here.box.pop((self.part, self.path)) \
            + self.outputs * F.mse_loss(own.to(wide), theirs.to(wide))
        if led.mode == "output":
            own = theirs.to(own.dtype)
        elif led.mode == "context":
            own = call(led.context[self.path])
        riding = self.state.riding
        return riding.on(own, term, 1.0) if term.requires_grad or riding.collected is not None \
            or not torch.is_grad_enabled() else own
