"""Contexts that are read into a LoRA by gradient steps, and its start, which learns that.

See ``methods/lifecycle/perk.py``; the steps are :func:`unrolled.unrolled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batches import call, cut, size
from ...core.errors import CheckError, ConfigError, DataError
from ..state.taps import evaluating
from ..weight.factor import Chain
from .unrolled import factors_standing, unrolled

#: (outputs, batch) -> (rows,)
Loss = Callable[[Any, Any], Tensor]


class Reader:
    """What reads contexts into a LoRA. rates: log eta, a tensor (K,) for each of phi."""

    def __init__(self, tuned: Any, loss: Loss, *, updates: int, unrolled: int, eta: float,
                 step_rate: float, rate_rate: float, lessons: int, segments: int):
        self.tuned, self.loss, self.updates, self.unrolled = tuned, loss, updates, unrolled
        self.step_rate, self.rate_rate = step_rate, rate_rate
        self.lessons, self.rows = lessons, segments
        places = {p.name: p for p in tuned.anatomy.places}
        self.phi: dict[str, nn.Parameter] = {}
        self.modules: dict[str, tuple[nn.Module, float]] = {}
        for name, term in tuned.terms(Chain):
            place = places[name]
            if place.kind not in ("linear", "conv1d") or place.rows or place.experts or \
                    type(term) is not Chain:
                raise ConfigError(f"perk reads into plain factors of whole linears, and {name} has "
                                  f"none ({type(term).__name__}, {place.kind}): 'lora(rank=256)'")
            self.modules[name] = tuned.model.get_submodule(place.path), float(term.scale)
            self.phi |= {f"{name}.A": term.A, f"{name}.B": term.B}
        trains = {id(p) for p in tuned.parameters()}
        if not self.phi or trains != {id(p) for p in self.phi.values()}:
            raise ConfigError("perk: a LoRA and nothing else trains: "
                              "burnish.tune(model, 'lora(rank=256)', head=False)")
        start = torch.full((updates,), eta).log()
        self.rates = {n: start.to(p.device, p.dtype).requires_grad_() for n, p in self.phi.items()}

    # -- reading ----------------------------------------------------------------------------------
    def read(self, context: Any, phi: Mapping[str, Tensor], through: int) -> dict[str, Tensor]:
        """phi_K of a context, from phi."""
        rates = [{n: t[k].exp() for n, t in self.rates.items()}
                 for k in range(self.updates)]
        n = size(context)
        if not n:
            raise DataError("perk: a context has a row a segment, and this one has none")
        return unrolled(phi, rates, lambda at, a, b: self._said(at, cut(context, b, a)).sum(), n,
                        self.rows, through)

    def _said(self, phi: Mapping[str, Tensor], batch: Any) -> Tensor:
        with self.tuned.disabled(), factors_standing(self.modules, phi):
            found = self.loss(call(self.tuned.model, batch), batch)
        if found.shape != (size(batch),):
            raise ConfigError(f"perk: a loss is a number a row, ({size(batch)},), got "
                              f"{tuple(found.shape)}")
        return found

    @contextmanager
    def reading(self, context: Any) -> Iterator[nn.Module]:
        """Inside, the LoRA holds a context; afterwards it is phi_0 again, bit for bit."""
        with self._still():
            phi = self.read(context, {n: p.detach() for n, p in self.phi.items()}, 0)
        was = {n: p.detach().clone() for n, p in self.phi.items()}
        try:
            self._put(phi)
            yield self.tuned.model
        finally:
            self._put(was)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for n, p in self.phi.items():
            p.copy_(values[n])

    @contextmanager
    def _still(self) -> Iterator[None]:
        with evaluating([m for m in self.tuned.model.modules() if m.training]):
            yield

    # -- learning ---------------------------------------------------------------------------------
    def outer(self, context: Any, question: Any) -> Tensor:
        """The loss on a question after its context has been read; follows phi_0 and eta."""
        return self._said(self.read(context, self.phi, self.unrolled), question).mean()

    def learn(self, given: Iterable[Any]) -> list[float]:
        """AdamW on phi_0 and log eta until the lessons, (context, question) each, end; losses."""
        optimizer = torch.optim.AdamW([
            {"params": list(self.phi.values()), "lr": self.step_rate},
            {"params": list(self.rates.values()), "lr": self.rate_rate, "weight_decay": 0.0}])
        lessons, told = iter(given), []
        params = [*self.phi.values(), *self.rates.values()]
        was = [p.grad for p in params]
        try:
            while some := list(islice(lessons, self.lessons)):
                if not all(isinstance(x, tuple | list) and len(x) == 2 for x in some):
                    raise DataError("perk: a lesson is (context, question), two batches")
                optimizer.zero_grad()
                with self._still(), torch.enable_grad():
                    losses = [self.outer(*lesson) / len(some) for lesson in some]
                    sum(losses, torch.zeros(())).backward()          # type: ignore[no-untyped-call]
                told.append(float(sum(x.detach() for x in losses)))
                if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in params):
                    raise CheckError("perk: the gradient of a lesson is not finite; nothing moved")
                optimizer.step()
        finally:
            for p, g in zip(params, was, strict=True):
                p.grad = g
        return told

    def state_dict(self) -> dict[str, Tensor]:
        """log eta; phi_0 is in the adapter's own file."""
        return {n: t.detach().clone() for n, t in self.rates.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in self.rates.items()}:
            raise ConfigError("perk: these rates are of another adapter or number of updates")
        for n, t in self.rates.items():
            t.copy_(state[n])
