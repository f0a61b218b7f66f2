"""Soft actor-critic: a policy of bounded actions that is rewarded for being undecided, too.

    a = tanh(m(s) + exp(l(s)) e),  e ~ N(0, 1)
    y = r + gamma (min_k Q'_k(s', a') - tau log pi(a' | s')),   Q'_k <- (1 - rho) Q'_k + rho Q_k
    L_Q = sum_k (Q_k(s, a) - y)^2,   L_pi = tau log pi(a | s) - min_k Q_k(s, a)
    L_tau = -log(tau) (log pi(a | s) + H),   H = -dim(a)

(Soft Actor-Critic Algorithms and Applications, 2018, arXiv:1812.05905.) Episodes have no end here.
On the host, and from generators of its own: equal seeds and equal rewards give equal actions.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.draw import drawn

GAMMA, RHO, BATCH = 0.99, 0.005, 64
#: of the deviation's logarithm: the policy begins near its mean
LEAST, MOST, FIRST = -5.0, 1.0, -1.0


def _net(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
                         nn.ReLU(), nn.Linear(hidden, outputs))


class SoftActor:
    """The policy, its critics and what they have seen."""

    def __init__(self, states: int, actions: int, hidden: int, seed: int, lr: float = 3e-4):
        with drawn(seed):
            self.actor = _net(states, hidden, 2 * actions)
            self.critics = nn.ModuleList(_net(states + actions, hidden, 1) for _ in range(2))
        with torch.no_grad():                        # the first mean is 0 everywhere
            self.actor[-1].weight.zero_()
            self.actor[-1].bias.zero_()
            self.actor[-1].bias[actions:] = FIRST
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_tau = nn.Parameter(torch.zeros(()))
        self.optimizers = [torch.optim.Adam(p, lr=lr) for p in (
            self.critics.parameters(), self.actor.parameters(), [self.log_tau])]
        self.actions, self.seen = actions, list[tuple[Tensor, Tensor, float, Tensor]]()
        self.generator = torch.Generator().manual_seed(seed)

    # -- acting ---------------------------------------------------------------------------------
    def policy(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(a, log pi(a | s)) for states (B, S)."""
        m, scale = self.actor(s).chunk(2, -1)
        scale = scale.clamp(LEAST, MOST)
        e = torch.randn(m.shape, generator=self.generator)
        u = m + scale.exp() * e
        density = -(e.square() / 2 + scale + math.log(2 * math.pi) / 2)
        bent = 2 * (math.log(2) - u - F.softplus(-2 * u))        # log(1 - tanh(u)^2)
        return u.tanh(), (density - bent).sum(-1)

    @torch.no_grad()
    def act(self, s: Tensor) -> Tensor:
        return self.policy(s[None])[0][0]

    # -- learning -------------------------------------------------------------------------------
    def remember(self, s: Tensor, a: Tensor, reward: float, after: Tensor) -> None:
        self.seen.append((s, a, reward, after))

    def learn(self) -> None:
        """One update of the critics, the policy and the temperature, from what was seen."""
        pick = torch.randint(len(self.seen), (min(BATCH, len(self.seen)),),
                             generator=self.generator)
        s, a, r, after = (torch.stack([torch.as_tensor(self.seen[i][k]) for i in pick.tolist()])
                          for k in range(4))
        tau = self.log_tau.detach().exp()
        with torch.no_grad():
            ahead, log = self.policy(after)
            y = r.float() + GAMMA * (self._least(self.targets, after, ahead) - tau * log)
        losses = sum((q(torch.cat([s, a], -1))[:, 0] - y).square().mean() for q in self.critics)
        self._step(0, losses)
        mine, log = self.policy(s)
        self._step(1, (tau * log - self._least(self.critics, s, mine)).mean())
        self._step(2, -(self.log_tau * (log.detach() - self.actions)).mean())
        with torch.no_grad():
            for old, new in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                old.lerp_(new, RHO)

    def _least(self, critics: Any, s: Tensor, a: Tensor) -> Tensor:
        return torch.minimum(*(q(torch.cat([s, a], -1))[:, 0] for q in critics))

    def _step(self, k: int, loss: Any) -> None:
        for group in self.optimizers[k].param_groups:
            for p, g in zip(group["params"], torch.autograd.grad(loss, group["params"]),
                            strict=True):
                p.grad = g
        self.optimizers[k].step()

    # -- going on -------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"actor": self.actor.state_dict(), "critics": self.critics.state_dict(),
                "targets": self.targets.state_dict(), "log_tau": self.log_tau.detach().clone(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "seen": [list(one) for one in self.seen],
                "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("actor", "critics", "targets"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_tau.copy_(state["log_tau"])
        for o, one in zip(self.optimizers, state["optimizers"], strict=True):
            o.load_state_dict(one)
        self.seen = [(s, a, float(r), after) for s, a, r, after in state["seen"]]
        self.generator.set_state(state["generator"])
