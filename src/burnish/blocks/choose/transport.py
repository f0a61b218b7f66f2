"""Optimal transport between two sets of points that weigh the same each, exactly and by blocks.

    OT(S, V) = min_F sum_ij F_ij C_ij,     sum_j F_ij = 1/n,  sum_i F_ij = 1/m,  F >= 0
             = max_u,v  mean_i u_i + mean_j v_j   while   u_i + v_j <= C_ij

:class:`Plan` is exact (shortest augmenting paths on whole units) and goes on from where it stands
when a point of S is exchanged: the flow of the others and both potentials stay, and one supply is
sent anew. v gives every outside point x a potential ``u(x) = min_j (C_xj - v_j)``; with it in place
of u_s the potentials stay feasible, so that exchanging s for x changes OT by at least
``(u(x) - u_s) / n``: where that bound promises nothing, no exchange helps.

:func:`potentials` are v of a large set, by Sinkhorn steps in which C exists a block at a time.
Letters: n points of S, m of V.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Plan:
    """The optimal plan of costs C (n, m), which may have rows exchanged. In fp64."""

    def __init__(self, costs: Tensor):
        self.C = costs.detach().cpu().double().numpy().copy()
        n, m = self.C.shape
        part = math.gcd(n, m)
        self.supply, self.demand, self.units = m // part, n // part, n * m // part
        self.F = np.zeros((n, m), dtype=np.int64)
        self.u, self.v = np.zeros(n), self.C.min(0)
        self.need = np.full(m, self.demand)
        for i in range(n):
            self._send(i)

    @property
    def value(self) -> float:
        """OT(S, V)."""
        return float((self.F * self.C).sum() / self.units)

    def potential(self, costs: Tensor) -> np.ndarray:
        """(k,) u(x) of points with these costs (k, m)."""
        found: np.ndarray = (costs.detach().cpu().double().numpy() - self.v).min(1)
        return found

    def exchange(self, i: int, costs: Tensor) -> float:
        """Another point in place of the i-th, with these costs (m,); what OT changes by."""
        before = self.value
        self.need += self.F[i]
        self.F[i] = 0
        self.C[i] = costs.detach().cpu().double().numpy()
        self._send(i)
        return self.value - before

    def copy(self) -> Plan:
        """One that may be tried on."""
        other = object.__new__(Plan)
        vars(other).update({k: v.copy() if isinstance(v, np.ndarray) else v
                            for k, v in vars(self).items()})
        return other

    def _send(self, i: int) -> None:
        """The supply of row i along shortest paths: reduced costs stay at least 0, and are 0 where
        something flows."""
        self.u[i] = (self.C[i] - self.v).min()
        left = self.supply
        while left:
            far, by, rows, via, done, column = self._search(i)
            target = column
            for r, at in rows.items():
                self.u[r] += far[target] - at
            self.v[done] -= far[target] - far[done]
            there, back = [], []                     # where more flows, where less
            while (row := int(by[column])) != i:
                there.append((row, column))
                column = via[row]
                back.append((row, column))
            there.append((i, column))
            sent = min(left, int(self.need[target]), *(int(self.F[at]) for at in back))
            for at in there:
                self.F[at] += sent
            for at in back:
                self.F[at] -= sent
            self.need[target] -= sent
            left -= sent

    def _search(self, i: int) -> tuple[np.ndarray, np.ndarray, dict[int, float], dict[int, int],
                                       np.ndarray, int]:
        """Dijkstra from row i: how far columns are and from which row, how far rows and through
        which column, the columns that are settled, and the last: the nearest that lacks some."""
        far = self.C[i] - self.u[i] - self.v
        by = np.full(len(far), i)
        rows, via = {i: 0.0}, dict[int, int]()
        done = np.zeros(len(far), dtype=bool)
        while True:
            j = int(np.where(done, np.inf, far).argmin())
            done[j] = True
            if self.need[j] > 0:
                return far, by, rows, via, done, j
            for r in map(int, self.F[:, j].nonzero()[0]):
                if r not in rows:
                    rows[r], via[r] = float(far[j]), j
                    new = far[j] + self.C[r] - self.u[r] - self.v
                    nearer = ~done & (new < far)
                    far[nearer], by[nearer] = new[nearer], r


def potentials(costs: Callable[[int, int], Tensor], points: int, block: int, *,
               smooth: float = 0.02, steps: int = 100) -> Tensor:
    """(m,) v of the whole set of `points`, by Sinkhorn steps in the logarithm.

    costs: (start, stop) -> C of these points, (stop - start, m); asked for again in every step.
    smooth: of the entropy, in mean costs.
    """
    spans = [(a, min(a + block, points)) for a in range(0, points, block)]
    total = sum(float(costs(*span).double().sum()) for span in spans)
    m = costs(0, 1).shape[1]
    eps = max(smooth * total / (points * m), torch.finfo(torch.float64).tiny)
    v = torch.zeros(m, dtype=torch.float64)
    for _ in range(steps):
        gathered = torch.full((m,), -math.inf, dtype=torch.float64)
        for span in spans:
            C = costs(*span).double().cpu()
            u = -eps * torch.logsumexp((v - C) / eps - math.log(m), 1, keepdim=True)
            gathered = torch.logaddexp(gathered, torch.logsumexp((u - C) / eps, 0))
        v = -eps * (gathered - math.log(points))
    return v


def exchanged(plan: Plan, inside: list[int], costs: Callable[[Tensor], Tensor], extra: Tensor,
              patience: int, block: int, say: Callable[[float], None] = lambda value: None
              ) -> float:
    """Exchange points of S for others while ``OT(S, V) + mean of extra over S`` falls; `inside` and
    the plan are changed in place, and the objective is returned.

    The point of S whose potential and extra are worst goes, the outside point of which they are
    best comes, and stays where the objective fell; after `patience` that did not stay, or where no
    exchange can help, it is over. costs: numbers of points -> C (k, m).
    """
    n, held = len(inside), extra.detach().cpu().double().numpy()
    value = plan.value + float(held[inside].mean())
    failed, outside = 0, np.array([x for x in range(len(held)) if x not in set(inside)])
    while len(outside) and failed < patience:
        worth = np.concatenate([plan.potential(costs(torch.from_numpy(part))) for part in
                                np.array_split(outside, -(-len(outside) // block))]) + held[outside]
        order = worth.argsort(kind="stable")
        i = int((plan.u + held[inside]).argmax())
        stays = plan.u[i] + held[inside[i]]
        for k in map(int, order):
            if failed >= patience or worth[k] >= stays - 1e-12 * max(1.0, abs(stays)):
                return value                         # no exchange of it can help
            x, trial = int(outside[k]), plan.copy()
            change = trial.exchange(i, costs(torch.tensor([x]))[0]) + \
                (held[x] - held[inside[i]]) / n
            if change < -1e-12 * max(1.0, abs(value)):
                vars(plan).update(vars(trial))
                outside[k], inside[i] = inside[i], x
                value, failed = plan.value + float(held[inside].mean()), 0
                say(value)
                break
            failed += 1
        else:
            return value
    return value
