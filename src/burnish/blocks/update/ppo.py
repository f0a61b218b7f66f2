"""Proximal policy optimisation: what a policy did, weighed by what came of it.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t = sum_k (gamma lambda)^k delta_{t+k},   R_t = A_t + V_t
    L = -min(rho A, clip(rho, 1 - c, 1 + c) A),   rho = exp(log pi(a) - log pi_old(a))

Nothing is expected behind the end of an episode. Letters: B episodes, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2


def advantages(rewards: Tensor, values: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """(A, R), each (B, T), of rewards and values (B, T) of episodes whose steps are `alive` (B, T)
    up to their ends; 0 behind them."""
    ahead = after = rewards.new_zeros(len(rewards))
    found = []
    for t in reversed(range(rewards.shape[1])):
        on = alive[:, t].to(rewards.dtype)
        delta = rewards[:, t] + GAMMA * after - values[:, t]
        ahead = on * (delta + GAMMA * LAMBDA * ahead)
        after = on * values[:, t]
        found.append(ahead)
    A = torch.stack(found[::-1], 1)
    return A, torch.where(alive, A + values, torch.zeros_like(values))


def surrogate(new: Tensor, old: Tensor, A: Tensor) -> Tensor:
    """L of each step, from the logarithms of probabilities."""
    rho = (new - old).exp()
    return -torch.minimum(rho * A, rho.clamp(1 - CLIP, 1 + CLIP) * A)


def drift(new: Tensor, old: Tensor) -> float:
    """How far the policy has gone: ``mean(rho - 1 - log rho)``, which estimates a KL divergence."""
    with torch.no_grad():
        return float(((new - old).exp() - 1 - (new - old)).mean())


class Returns:
    """Rewards over the deviation of the discounted returns seen so far,
    ``R <- gamma R + r`` from 0 in every episode; as they are while no return differs."""

    def __init__(self) -> None:
        self.count, self.mean, self.spread = 0, 0.0, 0.0

    def scaled(self, rewards: Tensor, alive: Tensor) -> Tensor:
        """(B, T) rewards of episodes that ran side by side, after they have been counted."""
        R, out = rewards.new_zeros(len(rewards)), torch.zeros_like(rewards)
        for t in range(rewards.shape[1]):
            on = alive[:, t]
            R = torch.where(on, GAMMA * R + rewards[:, t], R)
            for value in R[on].tolist():
                self.count += 1
                off = value - self.mean
                self.mean += off / self.count
                self.spread += off * (value - self.mean)
            std = (self.spread / self.count) ** 0.5 if self.spread else 1.0
            out[:, t] = torch.where(on, rewards[:, t] / std, out[:, t])
        return out
