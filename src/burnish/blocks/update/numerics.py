"""How the result of a step becomes the stored weight, slice by slice, several at once.

``load`` gives slices in the dtype of the step (views where the weights have it, else parts of one
flat copy), the step changes them in place, ``save`` rounds them once. The state each kind needs
lies in the optimizer's state under the name it has in ``kept``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .codecs import Spans, Streams, split, stochastic_bf16
from .noise import CounterNoise, halves
from .rules import accumulator

States = Sequence[dict[str, Any]]


def widened(slices: Sequence[Tensor], spans: Spans) -> tuple[list[Tensor], Tensor | None]:
    """The slices in the dtype of a step: themselves, or parts of one flat copy, given as well."""
    wide = accumulator(slices[0].dtype)
    if slices[0].dtype == wide:
        return list(slices), None
    flat = slices[0].new_empty(sum(s.numel() for s in slices), dtype=wide)
    out = split(flat, spans)
    torch._foreach_copy_(out, list(slices))
    return out, flat


class Numerics:
    """Round to nearest: what `copy_` does."""

    kept: ClassVar[str] = ""

    def prepare(self, w: Tensor, state: dict[str, Any]) -> None:
        """Make the state on first use. `w` is flat, in memory order."""

    def load(self, ws: list[Tensor], states: States, spans: Spans
             ) -> tuple[list[Tensor], Tensor | None]:
        """(slices to step, the flat tensor they are parts of)."""
        return widened(ws, spans)

    def save(self, ws: list[Tensor], states: States, spans: Spans, xs: list[Tensor],
             flat: Tensor | None, noise: Callable[[], Streams], turn: int) -> None:
        if xs[0].dtype != ws[0].dtype:               # the same dtype was changed in place
            torch._foreach_copy_(ws, xs)

    def read(self, w: Tensor, state: dict[str, Any], lo: int, hi: int) -> Tensor:
        """One slice of one tensor."""
        return self.load([w[lo:hi]], [state], [(lo, hi)])[0][0]

    def write(self, w: Tensor, state: dict[str, Any], lo: int, hi: int, x: Tensor,
              noise: CounterNoise, turn: int) -> None:
        self.save([w[lo:hi]], [state], [(lo, hi)], [x], x, lambda: [noise], turn)

    def own(self, states: States, spans: Spans) -> list[Tensor] | None:
        """Slices of the state of this kind; None where the weights need none."""
        if self.kept not in states[0]:
            return None
        return [s[self.kept][lo:hi] for s, (lo, hi) in zip(states, spans, strict=True)]


class Stochastic(Numerics):
    """bf16 weights: add uniform low bits, cut. Other dtypes: to nearest."""

    def save(self, ws: list[Tensor], states: States, spans: Spans, xs: list[Tensor],
             flat: Tensor | None, noise: Callable[[], Streams], turn: int) -> None:
        if ws[0].dtype == torch.bfloat16:
            assert flat is not None                  # they have been widened
            flat = stochastic_bf16(flat, halves(noise(), spans, turn, flat.device))
            torch._foreach_copy_(ws, split(flat, spans))
        else:
            super().save(ws, states, spans, xs, flat, noise, turn)


class Master(Numerics):
    """A full fp32 copy takes the step; the weight is its image."""

    kept: ClassVar[str] = "master"

    def prepare(self, w: Tensor, state: dict[str, Any]) -> None:
        if w.dtype != accumulator(w.dtype) and "master" not in state:
            state["master"] = w.to(accumulator(w.dtype))

    def load(self, ws: list[Tensor], states: States, spans: Spans
             ) -> tuple[list[Tensor], Tensor | None]:
        return self.own(states, spans) or ws, None


class Kahan(Numerics):
    """Weight plus compensation: y = rn(d + c), t = rn(w + y), c <- rn(y - (t - w)), w <- t."""

    kept: ClassVar[str] = "compensation"

    def prepare(self, w: Tensor, state: dict[str, Any]) -> None:
        if w.dtype != accumulator(w.dtype) and "compensation" not in state:
            state["compensation"] = torch.zeros_like(w)

    def load(self, ws: list[Tensor], states: States, spans: Spans
             ) -> tuple[list[Tensor], Tensor | None]:
        xs, flat = widened(ws, spans)
        if cs := self.own(states, spans):
            torch._foreach_add_(xs, cs)
        return xs, flat

    def save(self, ws: list[Tensor], states: States, spans: Spans, xs: list[Tensor],
             flat: Tensor | None, noise: Callable[[], Streams], turn: int) -> None:
        cs = self.own(states, spans)
        if cs is None:
            return super().save(ws, states, spans, xs, flat, noise, turn)
        assert flat is not None                      # half precision has been widened
        old = widened(ws, spans)[1]
        y = flat.copy_(flat.sub_(old).to(ws[0].dtype))
        torch._foreach_copy_(ws, split(old + y, spans))
        y.sub_(widened(ws, spans)[1].sub_(old))
        torch._foreach_copy_(cs, xs)
        return None


NUMERICS: dict[str, Numerics] = {"nearest": Numerics(), "stochastic": Stochastic(),
                                 "master": Master(), "kahan": Kahan()}
