"""Around a vocabulary's head: its logits wait until somebody reads them (forms.py)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.call import Call, call_of, resume
from ..state.prompts import Listener
from .cast import casting
from .chunked import Head
from .forms import logits
from .functions import transformed


class Rows(Listener):
    """Listens to a linear head while its adapter is active. chunk: rows that are made at once.

    made, taken: since the last update, runs whose logits waited, and losses that took chunks.
    """

    changes = False

    def __init__(self, state: Any, adapter: str, slot: Any, chunk: int):
        super().__init__(state, adapter)
        self.__dict__["slot"] = slot                 # it owns this module
        self.chunk, self.made, self.taken = chunk, 0, 0

    def check(self, call: Any) -> None:
        pass                                         # whatever adapters are in use

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        here, given = call_of(self.state), (*args, *kw.values())
        if len(given) != 1 or not self._acts(module, here, given[0]):
            return call(*args, **kw)
        return self._waiting(module, call, given[0], here)

    def _acts(self, module: nn.Module, here: Call, x: Tensor) -> bool:
        stored = module._parameters.get("weight")
        return not (here.off or here.rows is not None or not dict(here.active).get(self.adapter)
                    or transformed() or self.state.tape.others()
                    or self.slot.together(here.active)
                    or stored is not None and _cast(x) is None and stored.dtype != x.dtype)

    def _waiting(self, module: nn.Module, call: Callable[..., Any], x: Tensor, here: Call
                 ) -> Tensor:
        kind, dtype, slot = x.device.type, _cast(x), self.slot

        def run(x: Tensor) -> Tensor:
            with resume(here), torch.autocast(kind, dtype, enabled=dtype is not None):
                return call(x)

        def stock() -> tuple[Tensor, Tensor | None] | None:
            with resume(here):
                return slot.product(module, here.active)

        borrowed = (p for m in module.modules() for p in getattr(m, "borrowed", ()))
        held = [*module.parameters(), *module.buffers(), *borrowed]
        head = Head(run, tuple(t for t in held if t.requires_grad), stock, dtype or x.dtype)
        self.made += 1
        return logits(x, head, module.out_features, chunk=self.chunk, held=held, used=self._used)

    def _used(self) -> None:
        self.taken += 1


def _cast(x: Tensor) -> torch.dtype | None:
    """What autocast makes of the product just now; None where there is none."""
    return casting(x) if x.dtype != torch.float64 else None


class Said:
    """Says once, after an update, that the passes before it read all logits: nothing was saved."""

    def __init__(self, model: nn.Module, name: str):
        self.rows = [m for m in model.modules() if isinstance(m, Rows)]
        self.name, self.said = name, False

    def after_update(self, step: int) -> None:
        if not self.said and not any(r.taken for r in self.rows):
            self.said = True
            how = "whole logits were read by something else than F.cross_entropy" \
                if any(r.made for r in self.rows) else "the model never ran its head by itself"
            warnings.warn(f"{self.name} saves nothing here: {how}", stacklevel=2)
        for r in self.rows:
            r.made = r.taken = 0
