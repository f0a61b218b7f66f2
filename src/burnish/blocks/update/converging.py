"""Weights of tasks that follow how their losses fall, so that the tasks converge together.

    r_i(t) = l_i(t) / l_i(0), losses that were told, t = 0, 1, ...      N tasks
    a_i(t) = slope of the least-squares line through the last `window` of r_i

CoBa:  RCS = softmax_i(N a_i / sum_j |a_j|)            less for a task that falls faster than others
       ACS = softmax_i(-S a_i(t) / sum_s |a_i(s)|)     less for one that falls slower than it did
       DF  = min(1, S softmax_s(-tau S A(s) / sum_s |A(s)|)[t])
       w   = DF RCS + (1 - DF) ACS

the sums over s of the last S = `window` slopes (of DF: all since `warmup`), A the slope of
max_i r_i: DF falls from 1 as soon as the task that does worst turns up.

FAMO:  z = softmax(x), w_i = z_i / l_i over their sum: a step along it lowers each log l_i alike;
       x <- x - rate (J^T (log l(t-1) - log l(t)) + pull x), J the Jacobian of z.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...core.errors import CheckError

_LEAST = torch.finfo(torch.float64).tiny


def slopes(r: Tensor) -> Tensor:
    """Of the least-squares lines through the rows of r (..., T), T at least 2."""
    t = torch.arange(r.shape[-1], dtype=r.dtype)
    t = t - t.mean()
    return (r * t).sum(-1) / t.square().sum()


def relative(a: Tensor) -> Tensor:
    """RCS of slopes (N,)."""
    return (len(a) * a / a.abs().sum().clamp_min(_LEAST)).softmax(0)


def absolute(past: Tensor) -> Tensor:
    """ACS of the slopes (N, S) until now."""
    return (-past.shape[1] * past[:, -1] / past.abs().sum(1).clamp_min(_LEAST)).softmax(0)


def divergence(worst: Tensor, tau: float) -> Tensor:
    """DF of the slopes (S,) of the worst loss until now."""
    shares = (-tau * len(worst) * worst / worst.abs().sum().clamp_min(_LEAST)).softmax(0)
    return (len(worst) * shares[-1]).clamp_max(1)


class Coba:
    """Equal weights until `warmup` losses were told (at least 2), then CoBa's."""

    def __init__(self, tasks: int, warmup: int, window: int, tau: float):
        self.tasks, self.warmup, self.window, self.tau = tasks, max(warmup, 2), window, tau
        self.first: list[float] = []
        self.ratios: list[list[float]] = []      # the last `window` r (N,)
        self.past: list[list[float]] = []        # the last `window` slopes (N,)
        self.worst: list[float] = []
        self.n = 0

    def told(self, losses: list[float]) -> list[float]:
        """The weights, losses (N,) of the tasks being what they are now."""
        self.first = self.first or list(losses)
        self.ratios.append([now / max(first, _LEAST) for now, first
                            in zip(losses, self.first, strict=True)])
        del self.ratios[: -self.window]
        self.n += 1
        if self.n < self.warmup:
            return [1 / self.tasks] * self.tasks
        r = torch.tensor(self.ratios, dtype=torch.float64).mT
        a = slopes(r)
        self.past.append(a.tolist())
        del self.past[: -self.window]
        self.worst.append(float(slopes(r.amax(0))))
        df = divergence(torch.tensor(self.worst, dtype=torch.float64), self.tau)
        past = torch.tensor(self.past, dtype=torch.float64).mT
        w: list[float] = (df * relative(a) + (1 - df) * absolute(past)).tolist()
        return w

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items()
                if k in ("first", "ratios", "past", "worst", "n")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class Famo:
    """FAMO's weights."""

    def __init__(self, tasks: int, rate: float, pull: float):
        self.rate, self.pull = rate, pull
        self.x, self.before = [0.0] * tasks, [0.0] * 0

    def told(self, losses: list[float]) -> list[float]:
        """The weights, losses (N,) of the tasks being what they are now."""
        now = torch.tensor(losses, dtype=torch.float64).clamp_min(_LEAST)
        x = torch.tensor(self.x, dtype=torch.float64)
        if self.before:
            fell, z = torch.tensor(self.before, dtype=torch.float64).log() - now.log(), x.softmax(0)
            x = x - self.rate * (z * (fell - (z * fell).sum()) + self.pull * x)
        self.x, self.before = x.tolist(), now.tolist()
        w = x.softmax(0) / now
        shares: list[float] = (w / w.sum()).tolist()
        return shares

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x, "before": self.before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


# -- around an update -----------------------------------------------------------------------------
class Whole:
    """An update is of one batch, or of several that have been counted together."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def saw(self, batch: Mapping[str, Any]) -> None:
        if not any(batch["labels"] is labels for labels in self.seen):
            self.seen.append(batch["labels"])

    def step_begin(self, step: int) -> None:
        self.seen.clear()

    def before_update(self, step: int) -> None:
        n = len(self.seen)
        self.seen.clear()
        if n > 1:
            raise CheckError(f"{n} micro-batches went into this update, each divided by its own "
                             "counts of every task, which is another objective than of all "
                             "together: mftcoder's lifecycle(tuned, micro_batches) counts them, "
                             "and without accumulation there is one. Nothing was updated")


class Following(Whole):
    """Weights of the next update by what `rule` says of the losses told before it.

    weights: (tasks,), None while some task has had no loss. The losses are those of batches that
    trained, as they were then, until somebody tells others (:meth:`told_by`)."""

    def __init__(self, tasks: int, rule: Coba | Famo):
        super().__init__()
        self.rule, self.last, self.weights = rule, [None] * tasks, None
        self.apart = False                       # has anybody told others?
        self.heard: dict[int, tuple[Any, Tensor, Tensor]] = {}

    weights: list[float] | None
    last: list[float | None]

    def trained(self, batch: Mapping[str, Any], sums: Tensor, targets: Tensor) -> None:
        """Of a micro-batch: the sums of its targets' losses, and how many, (tasks,)."""
        if not self.apart:
            self.heard.setdefault(id(batch["labels"]), (batch["labels"], sums, targets))

    def told_by(self, sums: Tensor, targets: Tensor) -> None:
        """The same of data that do not train."""
        self.apart = True
        self.heard.clear()
        self.turn(sums, targets)

    def turn(self, sums: Tensor, targets: Tensor) -> None:
        if isinstance(sums, FakeTensor):
            return
        for i, (s, n) in enumerate(zip(sums.tolist(), targets.tolist(), strict=True)):
            if n:
                self.last[i] = s / n
        losses = [x for x in self.last if x is not None]
        if len(losses) == len(self.last):
            self.weights = self.rule.told(losses)

    def after_update(self, step: int) -> None:
        if self.heard:
            _, sums, targets = (list(x) for x in zip(*self.heard.values(), strict=True))
            self.heard.clear()
            self.turn(torch.stack(sums).sum(0), torch.stack(targets).sum(0))

    def told(self) -> Mapping[str, Any]:
        return {"weights": self.weights, "losses": self.last}

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict(), "last": self.last, "weights": self.weights,
                "apart": self.apart}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        self.last, self.weights, self.apart = (state[k] for k in ("last", "weights", "apart"))
