"""How much noise stands in a picture at each step, and what is to be told of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError


class Schedule:
    """``x_t = sqrt(a_t) x + sqrt(1 - a_t) e`` with a_t falling. tells: epsilon, v_prediction,
    sample.
    """

    def __init__(self, kept: Tensor, tells: str):
        self.kept, self.tells = kept, tells

    def __len__(self) -> int:
        return len(self.kept)

    def time(self, t: int) -> Tensor:
        """Step t as the model is told it."""
        return torch.tensor(t)

    def at(self, x: Tensor, noise: Tensor, t: int, gamma: float | None = None
           ) -> tuple[Tensor, Tensor, float]:
        """(x_t, what is to be told, its weight): the noise ``e`` (Ho et al., 2020), the velocity
        ``sqrt(a_t) e - sqrt(1 - a_t) x``, or the picture, which counts by ``a_t / (1 - a_t)``
        (both Salimans and Ho, 2022).

        gamma: min-SNR (Hang et al., 2023), the weight is ``min(s, gamma)`` of the picture's error,
        with ``s = a_t / (1 - a_t)``: over s of the noise's, over ``s + 1`` of the velocity's.
        """
        a = float(self.kept[t])
        there = a ** 0.5 * x + (1 - a) ** 0.5 * noise
        snr = a / max(1 - a, 1e-12)
        least = snr if gamma is None else min(snr, gamma)
        if self.tells == "epsilon":
            return there, noise, 1.0 if least == snr else least / snr
        if self.tells == "v_prediction":
            velocity = a ** 0.5 * noise - (1 - a) ** 0.5 * x
            return there, velocity, 1.0 if gamma is None else least / (snr + 1)
        return there, x, least


class Flow:
    """``x_t = (1 - s_t) x + s_t e`` with s_t rising; the model is told ``1000 s_t`` (of 1000 steps)
    and tells the velocity ``e - x`` (Lipman et al., 2023; Esser et al., 2024)."""

    def __init__(self, noise: Tensor):
        self.noise = noise

    def __len__(self) -> int:
        return len(self.noise)

    def time(self, t: int) -> Tensor:
        return (self.noise[t] * len(self)).float()

    def at(self, x: Tensor, noise: Tensor, t: int, gamma: float | None = None
           ) -> tuple[Tensor, Tensor, float]:
        """(x_t, the velocity, 1)."""
        if gamma is not None:
            raise ConfigError(f"snr_gamma={gamma:g} weighs steps by signal over noise, and a flow "
                              "learns every step alike; leave it out")
        s = float(self.noise[t])
        return (1 - s) * x + s * noise, noise - x, 1.0
