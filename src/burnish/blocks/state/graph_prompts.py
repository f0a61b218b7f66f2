"""Prompts that actors put on nodes of graphs, one after the other, before a frozen network.

    S_t (N, D) = states of the nodes under the prompts so far
    v ~ softmax over the nodes of f(S_t)
    a ~ N(m, 1),  m = z_max tanh(g(S_t[v])),   P[v] <- P[v] + a

f: D to D / 2 to D / 4 to 1, g: D to D / 2 to D / 2 to the width of what is prompted, tanh between.
One step for each node of a graph. Letters: B graphs, N nodes (padded), D width of the states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.batches import call
from ...core.draw import drawn
from ...core.errors import ConfigError, DataError
from ..update.ppo import Returns, advantages, drift, surrogate
from .prompts import accepts
from .taps import evaluating

ENTROPY, CRITIC, STOP_NODES, STOP_CONTENT = 0.01, 0.5, 0.001, 0.1


def _layers(act: Callable[[], nn.Module], *widths: int) -> nn.Sequential:
    pairs = list(zip(widths, widths[1:], strict=False))
    made = [m for a, b in pairs for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*made[:-1])


class Actors(nn.Module):
    """Which node gets a prompt, and what it is. Weights start orthogonal of gain sqrt(2), the last
    ones of 0.01, so that all nodes are as likely and means are near 0."""

    def __init__(self, states: int, prompted: int, z_max: float):
        super().__init__()
        self.z_max = z_max
        self.node = _layers(nn.Tanh, states, max(1, states // 2), max(1, states // 4), 1)
        self.content = _layers(nn.Tanh, states, max(1, states // 2), max(1, states // 2), prompted)
        for f in (self.node, self.content):
            linears = [m for m in f if isinstance(m, nn.Linear)]
            for m in linears:
                nn.init.orthogonal_(m.weight, gain=0.01 if m is linears[-1] else math.sqrt(2))
                nn.init.zeros_(m.bias)

    def nodes(self, S: Tensor, there: Tensor) -> Tensor:
        """(B, N) logarithms of probabilities; -inf for padding."""
        score: Tensor = self.node(S).squeeze(-1)
        return score.masked_fill(~there, -math.inf).log_softmax(-1)

    def mean(self, S: Tensor, v: Tensor) -> Tensor:
        """(B, width) m at nodes v (B,)."""
        return self.z_max * torch.tanh(self.content(S[torch.arange(len(S), device=S.device), v]))


class Critic(nn.Module):
    """What is still to come: an MLP on the states of all nodes, padded to `most` of them."""

    def __init__(self, states: int, most: int):
        super().__init__()
        d = states * most
        self.most = most
        self.layers = _layers(nn.ReLU, d, max(1, d // 20), max(1, d // 40), 1)
        for m in self.layers:
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(m.weight, gain=math.sqrt(2))
                nn.init.zeros_(m.bias)

    def forward(self, S: Tensor) -> Tensor:
        out: Tensor = self.layers(F.pad(S, (0, 0, 0, self.most - S.shape[-2])).flatten(-2))
        return out.squeeze(-1)


class Ensemble(nn.Module):
    """Several pairs of actors and one critic."""

    def __init__(self, members: int, states: int, prompted: int, most: int, z_max: float):
        super().__init__()
        self.members = nn.ModuleList(Actors(states, prompted, z_max) for _ in range(members))
        self.critic = Critic(states, most)

    def nodes(self, S: Tensor, there: Tensor) -> Tensor:
        """(B, N) probabilities: the members' largest, made to sum to 1."""
        most = torch.stack([a.nodes(S, there).exp() for a in self.members]).amax(0)   # type: ignore[operator]
        return most / most.sum(-1, keepdim=True)

    def mean(self, S: Tensor, v: Tensor) -> Tensor:
        """The members' mean m at nodes v."""
        return torch.stack([a.mean(S, v) for a in self.members]).mean(0)              # type: ignore[operator]


# -- the network ----------------------------------------------------------------------------------
@dataclass
class Episodes:
    """What happened: states (B, T, N, D), nodes and logs of their probabilities (B, T), prompts
    added (B, T, width) and the logs of theirs, losses (B, T + 1), which steps there were (B, T)."""

    S: Tensor
    v: Tensor
    log_v: Tensor
    a: Tensor
    log_a: Tensor
    losses: Tensor
    alive: Tensor

    @property
    def rewards(self) -> Tensor:
        """``L_t - L_{t+1}``, 0 behind an end."""
        return (self.losses[:, :-1] - self.losses[:, 1:]) * self.alive


class Graphs:
    """A network that does not change, whose nodes are prompted.

    embed: the module whose output, (B, N, width), prompts are added to. states: the one that
    returns S. loss(outputs, batch): (B,).
    """

    def __init__(self, model: nn.Module, embed: nn.Module, states: nn.Module,
                 loss: Callable[[Any, Any], Tensor]):
        self.model, self.embed, self.states, self.loss = model, embed, states, loss
        self.unread = [k for k in ("mask", "labels") if not accepts(model, k)]

    def there(self, batch: Any) -> Tensor:
        """(B, N) nodes that are no padding: `mask`, or rows of `nodes` that are not zeros."""
        found = batch.get("mask") if isinstance(batch, Mapping) else None
        if found is None and isinstance(batch, Mapping):
            found = batch.get("nodes")
            found = found if not isinstance(found, Tensor) or found.dim() != 3 else \
                found.abs().sum(-1)
        if not isinstance(found, Tensor) or found.dim() != 2:
            raise DataError("relief: batches are mappings with nodes (graphs, nodes, features), or "
                            "with a mask (graphs, nodes)")
        if not bool((found := found != 0).any(1).all()):
            raise DataError("relief: a graph of a batch has no node")
        return found

    def run(self, batch: Any, prompt: Tensor | None) -> tuple[Tensor, Any, Tensor]:
        """(S, what the model answers, what was prompted) under these prompts."""
        seen: dict[str, Tensor] = {}

        def enter(m: Any, args: Any, out: Tensor) -> Tensor:
            seen["in"] = out
            return out if prompt is None else out + prompt.to(out.dtype)

        def leave(m: Any, args: Any, out: Any) -> None:
            seen["out"] = out

        given = {k: v for k, v in batch.items() if k not in self.unread}
        hooks = [self.embed.register_forward_hook(enter), self.states.register_forward_hook(leave)]
        try:
            with evaluating([m for m in self.model.modules() if m.training]):
                answer = call(self.model, given)
        finally:
            for h in hooks:
                h.remove()
        for name in ("in", "out"):
            if not isinstance(seen.get(name), Tensor) or seen[name].dim() != 3:
                raise ConfigError("relief: the modules that embed nodes and return their states "
                                  "are to answer with (graphs, nodes, width), and one does not")
        return _wide(seen["out"].detach()), answer, seen["in"].detach()

    @torch.no_grad()
    def played(self, actors: Actors, batch: Any) -> Episodes:
        """Episodes of one member, drawn. As many forwards as the largest graph has nodes, and one
        more."""
        there, prompt = self.there(batch), None
        B, steps = len(there), int(there.sum(1).max())
        rows, kept, losses = torch.arange(B, device=there.device), [], []
        for t in range(steps + 1):
            S, answer, given = self.run(batch, prompt)
            losses.append(_wide(self.loss(answer, batch)))
            if t == steps:
                break
            prompt = torch.zeros_like(_wide(given)) if prompt is None else prompt
            log = actors.nodes(S, there)
            v = torch.multinomial(log.exp(), 1).squeeze(1)
            m = actors.mean(S, v)
            a = m + torch.randn_like(m)
            alive = t < there.sum(1)
            prompt = prompt.index_put((rows, v), a * alive.unsqueeze(1), accumulate=True)
            kept.append((S, v, log[rows, v], a, normal(a, m), alive))
        parts = [torch.stack(x, 1) for x in zip(*kept, strict=True)]
        return Episodes(*parts[:5], torch.stack(losses, 1), parts[5])

    @torch.no_grad()
    def prompts(self, ensemble: Ensemble, batch: Any, draw: bool) -> Tensor:
        """(B, N, width) prompts of the ensemble, without noise; nodes are drawn, or the likeliest
        are taken."""
        there = self.there(batch)
        rows, prompt = torch.arange(len(there), device=there.device), None
        for t in range(int(there.sum(1).max())):
            S, _, given = self.run(batch, prompt)
            prompt = torch.zeros_like(_wide(given)) if prompt is None else prompt
            p = ensemble.nodes(S, there)
            v = torch.multinomial(p, 1).squeeze(1) if draw else p.argmax(1)
            a = ensemble.mean(S, v) * (t < there.sum(1)).unsqueeze(1)
            prompt = prompt.index_put((rows, v), a, accumulate=True)
        assert prompt is not None
        return prompt


@dataclass(frozen=True)
class Prompted:
    """A graph network with the policy that prompts its nodes: ``prompted(batch)`` is the model's
    answer, ``prompted.prompts(batch)`` (B, N, width) what stands on the nodes. `policy` is a module
    (its ``state_dict`` goes into a file); losses: of the head's passes, the mean of their batches.
    """

    graphs: Graphs
    policy: Ensemble
    draws: bool
    seed: int
    losses: tuple[float, ...] = ()

    def prompts(self, batch: Any) -> Tensor:
        """P; the same one for the same batch."""
        with drawn(self.seed):
            return self.graphs.prompts(self.policy, batch, self.draws)

    def __call__(self, batch: Any) -> Any:
        with torch.no_grad():
            return self.graphs.run(batch, self.prompts(batch))[1]


def normal(a: Tensor, m: Tensor) -> Tensor:
    """The log density of a at N(m, 1), summed over the last axis."""
    return -0.5 * ((a - m).square() + math.log(math.tau)).sum(-1)


def parts(rows: Sequence[Any], members: int, overlap: float) -> Iterator[list[Any]]:
    """For each member its share of the rows and `overlap` of a share of those that follow."""
    share = math.ceil(len(rows) / members)
    more = min(round(overlap * share), len(rows) - share)
    for i in range(members):
        end = min((i + 1) * share, len(rows)) + more
        yield [rows[j % len(rows)] for j in range(i * share, end)]


# -- learning -------------------------------------------------------------------------------------
class Learner:
    """Proximal steps of an ensemble, one member at a time, the critic with each.

        L = L_node + L_content - 0.01 entropy of nodes + 0.5 (V - R)^2
            + alpha_d KL(p || p_i) + alpha_c KL(N(m_i, 1) || N(m, 1))

    p, m: what the ensemble says, as constants, m at its likeliest node. Adam of eps 1e-5, gradients
    clipped to a norm of 0.5; advantages less their mean, over their deviation. A member stops over
    these episodes once its nodes have drifted by more than 0.001, or what it puts there by 0.1.
    """

    def __init__(self, ensemble: Ensemble, rate: float, passes: int, rows: int, alpha_d: float,
                 alpha_c: float):
        self.ensemble, self.passes, self.rows = ensemble, passes, rows
        self.alpha_d, self.alpha_c = alpha_d, alpha_c
        self.rules = [torch.optim.Adam([*a.parameters(), *ensemble.critic.parameters()], rate,
                                       eps=1e-5) for a in ensemble.members]
        self.returns = [Returns() for _ in ensemble.members]

    def loss(self, i: int, S: Tensor, there: Tensor, v: Tensor, a: Tensor, A: Tensor, R: Tensor,
             old: tuple[Tensor, Tensor]) -> tuple[Tensor, float, float]:
        """L of some steps, and how far both policies have gone from what they were."""
        actors, e = self.ensemble.members[i], self.ensemble
        log = actors.nodes(S, there)                                  # type: ignore[operator]
        log_v = log.gather(1, v.unsqueeze(1)).squeeze(1)
        log_a = normal(a, actors.mean(S, v))                          # type: ignore[operator]
        safe = log.masked_fill(~there, 0.0)
        entropy = -(log.exp() * safe).sum(1)
        L = surrogate(log_v, old[0], A) + surrogate(log_a, old[1], A) - ENTROPY * entropy
        if len(e.members) > 1:
            with torch.no_grad():
                p = e.nodes(S, there)
                best = p.argmax(1)
                m = e.mean(S, best)
                own = torch.special.xlogy(p, p).sum(1)
            L = L + self.alpha_d * (own - (p * safe).sum(1))
            apart = actors.mean(S, best) - m                          # type: ignore[operator]
            L = L + self.alpha_c * 0.5 * apart.square().sum(1)
        L = L + CRITIC * (e.critic(S) - R).square()
        return L.mean(), drift(log_v, old[0]), drift(log_a, old[1])

    def play(self, i: int, graphs: Graphs, batch: Any) -> None:
        """Member i plays on a batch and learns of it."""
        seen = graphs.played(self.ensemble.members[i], batch)         # type: ignore[arg-type]
        self.learn(i, seen, graphs.there(batch))

    def learn(self, i: int, seen: Episodes, there: Tensor) -> None:
        """Steps of member i on its episodes."""
        e, alive = self.ensemble, seen.alive
        with torch.no_grad():
            A, R = advantages(self.returns[i].scaled(seen.rewards, alive), e.critic(seen.S), alive)
        flat = [x[alive] for x in (seen.S, there.unsqueeze(1).expand(*alive.shape, -1), seen.v,
                                   seen.a, A, R, seen.log_v, seen.log_a)]
        flat[4] = (flat[4] - flat[4].mean()) / (flat[4].std(unbiased=False) + 1e-8)
        for _ in range(self.passes):
            gone: list[tuple[float, float]] = []
            for at in torch.randperm(len(flat[4]), device=alive.device).split(self.rows):
                S, mask, v, a, A_t, R_t, *old = (x[at] for x in flat)
                L, *how = self.loss(i, S, mask, v, a, A_t, R_t, (old[0], old[1]))
                params = self.rules[i].param_groups[0]["params"]
                self.rules[i].zero_grad()
                L.backward()
                nn.utils.clip_grad_norm_(params, 0.5)
                self.rules[i].step()
                gone.append((how[0], how[1]))
            d, c = (sum(x) / len(x) for x in zip(*gone, strict=True))
            if d > STOP_NODES or c > STOP_CONTENT:
                break


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
