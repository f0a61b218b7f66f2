"""How the fp32 result of a step becomes the stored weight, one slice at a time.

``read`` gives the slice in the dtype of the step (a view where the weight already has it), the
step changes it in place, ``write`` rounds it once. The state each kind needs lives in the
optimizer's state under the names below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codecs import stochastic_bf16
from .noise import CounterNoise
from .rules import accumulator


class Numerics:
    """Round to nearest: what `copy_` does."""

    def prepare(self, w: Tensor, state: dict[str, Tensor]) -> None:
        """Make the state on first use. `w` is flat, in memory order."""

    def read(self, w: Tensor, state: dict[str, Tensor], lo: int, hi: int) -> Tensor:
        return w[lo:hi].to(accumulator(w.dtype))

    def write(self, w: Tensor, state: dict[str, Tensor], lo: int, hi: int, x: Tensor,
              noise: CounterNoise, turn: int) -> None:
        if x.dtype != w.dtype:                       # the same dtype was changed in place
            w[lo:hi].copy_(x)


class Stochastic(Numerics):
    """bf16 weights: add uniform low bits, cut. Other dtypes: to nearest."""

    def write(self, w: Tensor, state: dict[str, Tensor], lo: int, hi: int, x: Tensor,
              noise: CounterNoise, turn: int) -> None:
        if w.dtype == torch.bfloat16:
            bits = noise.bits16(hi - lo, lo, turn=turn, device=x.device)
            w[lo:hi].copy_(stochastic_bf16(x, bits))
        else:
            super().write(w, state, lo, hi, x, noise, turn)


class Master(Numerics):
    """A full fp32 copy takes the step; the weight is its image."""

    def prepare(self, w: Tensor, state: dict[str, Tensor]) -> None:
        if w.dtype != accumulator(w.dtype) and "master" not in state:
            state["master"] = w.to(accumulator(w.dtype))

    def read(self, w: Tensor, state: dict[str, Tensor], lo: int, hi: int) -> Tensor:
        return state.get("master", w)[lo:hi]


class Kahan(Numerics):
    """Weight plus compensation: y = rn(d + c), t = rn(w + y), c <- rn(y - (t - w)), w <- t."""

    def prepare(self, w: Tensor, state: dict[str, Tensor]) -> None:
        if w.dtype != accumulator(w.dtype) and "compensation" not in state:
            state["compensation"] = torch.zeros_like(w)

    def read(self, w: Tensor, state: dict[str, Tensor], lo: int, hi: int) -> Tensor:
        x = super().read(w, state, lo, hi)
        return x.add_(state["compensation"][lo:hi]) if "compensation" in state else x

    def write(self, w: Tensor, state: dict[str, Tensor], lo: int, hi: int, x: Tensor,
              noise: CounterNoise, turn: int) -> None:
        if "compensation" not in state:
            return super().write(w, state, lo, hi, x, noise, turn)
        here = w[lo:hi]
        old = here.to(x.dtype)
        y = x.sub_(old).to(w.dtype).to(x.dtype)
        here.copy_(old + y)
        state["compensation"][lo:hi].copy_(y.sub_(here.to(x.dtype)).add_(old))


NUMERICS: dict[str, Numerics] = {"nearest": Numerics(), "stochastic": Stochastic(),
                                 "master": Master(), "kahan": Kahan()}
