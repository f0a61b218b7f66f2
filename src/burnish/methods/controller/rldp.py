from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.choose.soft_actor import SoftActor
from ...blocks.update.filters import Filter, best, planned
from ...blocks.update.private import Clipped, ClippedApart, hide, norm
from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ._private import EPSILON, Private, PrivateSums

if TYPE_CHECKING:
    from ...core.protocols import Tuned

#: updates that a filter's order is chosen for where their number is not known
SOME = 1000
#: updates of the policy behind a window, once there are windows enough
LEARNS, ENOUGH = 4, 4
FEW = "it acts once the policy has learnt: tests/methods/test_rldp.py"


@dataclass(frozen=True, kw_only=True)
class Rldp(PrivateSums):
    """RLDP: DP-SGD whose largest norms and noise a policy sets while it trains.

        g_j = (sum_i g_ij min(1, C_j / ||g_ij||) + N(0, sigma^2 J C_j^2)) / B,   j = 1 ... J

    j: what trains at one place of the model (a pair of factors), or all together. Divided by C_j
    the sum moves by sqrt(J) at most with one sample, so sigma is its noise in units of that. Behind
    every window of `every` updates a soft actor-critic sets ``C_j = max_norm s^a_j`` and ``sigma =
    sigma_0 s^a``, a in (-1, 1), s = `swing`; sigma_0 is the least noise with which all updates
    spend epsilon at one size. Its reward is what the window has gained less `price` times what it
    has spent, at the plan's pace 1.

    It sees nothing that has not been told: per j the size of g_j beside its noise, its own last
    action, what is left of the run and of the budget, and as gain ``-sum_t <g_t, theta_t -
    theta_(t-1)>``, the first-order fall of the loss by gradients that have their noise (the paper
    looks at losses and raw norms, which tell of samples; unconfirmed in other details). What is
    spent is bounded by a filter for noise that is chosen on the way (blocks/update/filters.py), at
    one order: sigma is kept so large that the planned updates remain affordable at `swing` sigma_0,
    and an update beyond the budget is refused. Where the number of updates is not known, sigma is
    never below sigma_0.

    Start, what may train, costs and refusals: `dp`'s, and a copy of what trains. With ``swing=1``
    nothing is chosen: plain DP-SGD, group by group. Worth trying on runs of many windows; a policy
    of a few dozen rewards has hardly learnt.
    """

    paper: ClassVar[str] = ("Efficient Differentially Private Fine-Tuning of LLMs via "
                            "Reinforcement Learning (2025), arXiv:2507.22565")
    tier: ClassVar[str] = "from the text"
    small: ClassVar[dict[str, Any]] = {"sigma": 0.01, "batch": 2.0, "records": 50, "every": 2}

    epsilon: float | None = setting(None, "what the run may spend; None: 8, or what sigma spends",
                                    other=(4.0,), beside={"sigma": None})
    per_place: bool = setting(True, "each place has a largest norm of its own, not all one")
    every: int = setting(10, "K, updates of a window")
    swing: float = setting(4.0, "s, most that a norm or the noise is moved by")
    price: float = setting(1.0, "of spending at the plan's pace", unseen=FEW)
    hidden: int = setting(64, "width of the policy and its critics", unseen=FEW)
    seed: int = setting(0, "of the policy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.every, self.hidden) < 1 or not 1 <= self.swing < float("inf") \
                or not 0 <= self.price < float("inf"):
            raise RecipeError(f"{self}: expected every and hidden of 1 or more, swing of 1 or "
                              "more, price of 0 or more")

    def hand(self, tuned: Tuned) -> Chosen:
        return Chosen(self, tuned)


class Chosen(Private):
    """The policy's hands."""

    method: Rldp

    def __init__(self, method: Rldp, tuned: Tuned):
        super().__init__(method, tuned)
        self.filter: Filter | None = None
        self.policy: SoftActor | None = None
        self.plan: float | None = method.sigma       # sigma_0
        self.clips: list[float] = []                 # of each group, in units of max_norm
        self.action: Tensor | None = None
        self.state: Tensor | None = None             # in which it was taken
        self.window: dict[str, Any] = {"gain": 0.0, "sizes": None, "spent": 0.0}
        self.scale = 0.0                             # of gains, as they were so far
        self.before: dict[str, Tensor] = {}          # what trains, an update ago

    # -- groups -----------------------------------------------------------------------------------
    def grouped(self, trains: Mapping[str, nn.Parameter]) -> list[list[nn.Parameter]]:
        """What trains, place by place."""
        out: dict[str, list[nn.Parameter]] = {}
        for name, p in trains.items():
            out.setdefault(_place(name) if self.method.per_place else "", []).append(p)
        if len(self.clips) != len(out):
            self.clips = [1.0] * len(out)
        return list(out.values())

    def bounds(self) -> list[float]:
        return [self.method.max_norm * c for c in self.clips]

    def clipped(self, trains: Mapping[str, nn.Parameter]) -> Clipped:
        groups = self.grouped(trains)
        return ClippedApart(groups, self.bounds())

    # -- the budget -------------------------------------------------------------------------------
    def _plan(self) -> None:
        if self.rehearsing:
            return
        at, total, m = self.sampling, self.tuned.total_steps, self.method
        if at is None or (total is None and m.sigma is None):
            raise ConfigError("rldp keeps within a budget, which takes records=, batch= and the "
                              "number of updates (tuned.total_steps = ...), which burnish.fit "
                              "says; give them (or, without an end, sigma=)")
        if self.filter is None:
            delta = self.delta(at)
            if m.sigma is None:
                epsilon = m.epsilon or EPSILON
                self.plan, order = planned(epsilon, at.rate, total, delta)
            else:
                epsilon, order = best(m.sigma, at.rate, total or SOME, delta)
            self.planned = total
            self.sigma = self.plan
            self.filter = Filter(epsilon if total else float("inf"), delta, at.rate, order)
        self.over()

    # -- an update --------------------------------------------------------------------------------
    def before_update(self, step: int) -> None:
        trains = dict(self.tuned.named_parameters())
        groups = self.grouped(trains)
        batch = self.method.batch or (self.sampling.batch if self.sampling else 1.0)
        sigma = 1.0 if self.sigma is None else self.sigma
        if not self.rehearsing and self.filter is not None:
            was = self.filter.spent
            self.filter.charge(sigma)
            self.window["spent"] += self.filter.spent - was
        spread = [sigma * len(groups)**0.5 * c for c in self.bounds()]
        for group, size in zip(groups, spread, strict=True):
            hide(group, size, batch)
        if self.method.swing > 1:
            self._look(trains, groups, [s / batch for s in spread])
        self.spent += not self.rehearsing
        if self.method.swing > 1 and not self.rehearsing and self.spent % self.method.every == 0:
            self._choose()
        self.rehearsing = False

    @torch.no_grad()
    def _look(self, trains: Mapping[str, nn.Parameter], groups: list[list[nn.Parameter]],
              spread: list[float]) -> None:
        """What is told by gradients that have their noise."""
        gain = 0.0
        for n, p in trains.items():
            old = self.before.get(n)
            if old is None or (old.shape, old.dtype) != (p.shape, p.dtype):
                self.before[n] = p.detach().clone()
                continue
            moved = old.neg_().add_(p)               # in the copy itself: one is held
            gain -= 0.0 if self.rehearsing else float(torch.dot(p.grad.flatten(), moved.flatten()))
            old.copy_(p)
        if self.rehearsing:
            return
        self.window["gain"] += gain
        sizes = torch.tensor([float(norm(p.grad for p in g)) / (s * sum(p.numel() for p in g)**0.5)
                              for g, s in zip(groups, spread, strict=True)])
        seen = self.window["sizes"]
        self.window["sizes"] = sizes if seen is None or len(seen) != len(sizes) else seen + sizes

    # -- a window ---------------------------------------------------------------------------------
    def _choose(self) -> None:
        """Tell the policy what came of the last window, and let it set the next one."""
        m, filter = self.method, self.filter
        assert filter is not None and self.plan is not None
        window, self.window = self.window, {"gain": 0.0, "sizes": None, "spent": 0.0}
        self.scale = max(0.9 * self.scale, abs(window["gain"]), 1e-12)
        gain = window["gain"] / self.scale
        pace = m.every * filter.cost(self.plan)
        reward = gain - m.price * window["spent"] / max(pace, 1e-30)
        J, total = len(self.clips), self.planned
        last = torch.zeros(J + 1) if self.action is None else self.action
        told = [gain, 0.0 if total is None else filter.spent / max(filter.budget, 1e-30),
                0.0 if total is None else self.spent / total]
        now = torch.cat([(window["sizes"] / m.every).clamp_min(1e-12).log(), last,
                         torch.tensor(told)])
        if self.policy is None:
            self.policy = SoftActor(len(now), J + 1, m.hidden, m.seed)
        if self.state is not None and self.action is not None \
                and len(self.state) == len(now) and len(self.action) == J + 1:
            self.policy.remember(self.state, self.action, reward, now)
            for _ in range(LEARNS if len(self.policy.seen) >= ENOUGH else 0):
                self.policy.learn()
        self.state, self.action = now, self.policy.act(now)
        self.clips = [m.swing ** float(a) for a in self.action[:J]]
        wish, most = self.plan * m.swing ** float(self.action[J]), self.plan * m.swing
        if total is None:
            self.sigma = max(wish, self.plan)
        elif (left := total - self.spent) > 0:
            here = min(m.every, left)
            self.sigma = min(most, max(wish, filter.least(here, left - here, most)))

    # -- what is told, and going on ---------------------------------------------------------------
    def told(self) -> Mapping[str, Any]:
        said: dict[str, Any] = {"sigma": self.sigma, "max_norm": self.bounds() or
                                self.method.max_norm, "updates": self.spent}
        if self.filter is not None:
            said |= {"epsilon": self.filter.told(), "delta": self.filter.delta,
                     "rate": self.filter.rate, "order": self.filter.order, "accountant": "rdp"}
        return said

    def state_dict(self) -> Mapping[str, Any]:
        f, p = self.filter, self.policy
        return {**super().state_dict(), "plan": self.plan, "clips": self.clips,
                "action": self.action, "state": self.state, "window": dict(self.window),
                "scale": self.scale, "before": self.before,
                "filter": None if f is None else [f.epsilon, f.delta, f.rate, f.order, f.spent],
                "policy": None if p is None else p.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.plan, self.clips, self.scale = state["plan"], list(state["clips"]), state["scale"]
        self.action, self.state = state["action"], state["state"]
        self.window, self.before = dict(state["window"]), dict(state["before"])
        self.filter = None if state["filter"] is None else Filter(*state["filter"])
        if state["policy"] is not None:
            assert self.state is not None
            self.policy = SoftActor(len(self.state), len(self.clips) + 1, self.method.hidden,
                                    self.method.seed)
            self.policy.load_state_dict(state["policy"])


def _place(name: str) -> str:
    """Where a tensor stands: the part of an adapter at one module, or the module."""
    path, mark, rest = name.partition("burnish.")
    return path + mark + ".".join(rest.split(".")[:2]) if mark else name.rpartition(".")[0]
