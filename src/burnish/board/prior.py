"""What recipes may be expected to reach on a task nobody has run: the planner's prior.

The gain of recipe r over LoRA on task t is taken as

    g_rt = m + a_r + b_rt + e_rt,   a ~ N(0, omega^2),  b ~ N(0, tau^2),  e ~ N(0, s_rt^2)

with s_rt^2 the variance of the difference of two means over seeds; m, omega and tau are those under
which the gains that were measured are most likely (empirical Bayes). What is ten points behind or
ahead counts as ten. A kind of task that was measured is expected at the mean of a_r + b_rt over its
tasks, any other at a_r, each with its standard deviation.

Whether that helps is told by leaving a task out: of the recipes that ran on it, the one with the
best expectation from the others is held against the best there was (the regret).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, variance
from typing import Any

from .page import LORA
from .records import Records
from .tasks import KINDS, TASKS

MOST = 0.1
#: seeds leave out what other test rows would do
FLOOR = 0.002


@dataclass(frozen=True)
class Gains:
    """recipe -> task -> (gain over LoRA, its variance), and LoRA's own scores."""

    of: dict[str, dict[str, tuple[float, float]]]
    lora: dict[str, float]

    def without(self, task: str) -> Gains:
        return Gains({r: {t: g for t, g in by.items() if t != task} for r, by in self.of.items()},
                     {t: s for t, s in self.lora.items() if t != task})


def gains(records: Records) -> Gains:
    """Of runs with defaults."""
    scores: dict[str, dict[str, list[float]]] = {}
    for r in records:
        if r.budget == "as_is" and r.scores:
            scores.setdefault("lora" if r.recipe in LORA else r.recipe, {})[r.task] = r.scores
    lora = scores.get("lora", {})

    def var(s: list[float]) -> float:
        return (variance(s) / len(s) if len(s) > 1 else 0.0) + FLOOR ** 2

    return Gains({name: {t: (min(MOST, max(-MOST, mean(s) - mean(lora[t]))),
                             var(s) + var(lora[t])) for t, s in by.items() if t in lora}
                  for name, by in scores.items() if name != "lora"},
                 {t: mean(s) for t, s in lora.items()})


@dataclass(frozen=True)
class Spread:
    """m, omega, tau of above."""

    m: float
    omega: float
    tau: float


def spread(found: Gains) -> Spread:
    """The likeliest, on a grid."""
    import numpy as np

    rows = [by for by in found.of.values() if by]
    tasks = list(found.lora)
    g, s2 = (np.array([[by[t][k] if t in by else np.nan for t in tasks] for by in rows])
             for k in (0, 1))
    grid = [0.0, *np.geomspace(0.001, 0.1, 25)]
    best, out = -np.inf, Spread(0.0, 0.0, 0.01)
    for omega in grid:
        for tau in grid[1:]:
            # the inverse of diag(1 / d) + omega^2 11^T by Sherman and Morrison, a recipe a row
            d = np.nan_to_num(1 / (tau ** 2 + s2))
            shrink = omega ** 2 / (1 + omega ** 2 * d.sum(1))
            seen = (d * np.nan_to_num(g)).sum(1) * (1 - shrink * d.sum(1))
            weight = d.sum(1) * (1 - shrink * d.sum(1))
            m = seen.sum() / weight.sum() if weight.sum() else 0.0
            x = np.nan_to_num(g - m)
            likely = -0.5 * ((d * x * x).sum() - (shrink * (d * x).sum(1) ** 2).sum()
                             - np.log(d[d > 0]).sum() + np.log1p(omega ** 2 * d.sum(1)).sum())
            if likely > best:
                best, out = likely, Spread(float(m), float(omega), float(tau))
    return out


def expected(by: dict[str, tuple[float, float]], at: Spread, kind: str | None = None
             ) -> tuple[float, float]:
    """(gain, standard deviation) of one recipe on a kind of task; None: on any other."""
    import numpy as np

    tasks = list(by)
    own = [t for t in tasks if kind is not None and KINDS.get(t) == kind]
    g = np.array([by[t][0] for t in tasks])
    cov = np.full((len(tasks), len(tasks)), at.omega ** 2)
    cov += np.diag([at.tau ** 2 + by[t][1] for t in tasks]) if tasks else 0
    cross = np.array([at.omega ** 2 + (at.tau ** 2 / len(own) if t in own else 0) for t in tasks])
    prior = at.omega ** 2 + (at.tau ** 2 / len(own) if own else at.tau ** 2)
    if not tasks:
        return at.m, prior ** 0.5
    weights = np.linalg.solve(cov, cross)
    return (float(at.m + weights @ (g - at.m)),
            float(max(prior - weights @ cross, 0.0) ** 0.5))


def regrets(found: Gains) -> dict[str, dict[str, Any]]:
    """task -> who would have been chosen, what is lost by it, and what by always taking LoRA."""
    out = {}
    for task in found.lora:
        here = {r: by[task][0] for r, by in found.of.items() if task in by} | {"lora": 0.0}
        rest = found.without(task)
        if not any(rest.of.values()):
            continue
        at = spread(rest)
        wish = {r: expected(rest.of[r], at, KINDS.get(task))[0] if r != "lora" else 0.0
                for r in here if r == "lora" or rest.of[r]}
        best, chosen = max(here, key=here.__getitem__), max(wish, key=wish.__getitem__)
        out[task] = {"chosen": chosen, "best": best,
                     "regret": round(here[best] - here[chosen], 4),
                     "of_lora": round(here[best], 4)}
    return out


def prior(records: Records) -> dict[str, Any]:
    """The document that the planner reads: recipe -> kind -> (score, standard deviation), and the
    rates that were best; under "_" what it was made of."""
    found = gains(records)
    at = spread(found)
    kinds = sorted({KINDS[t] for t in found.lora if t in KINDS})
    level = {k: mean(s for t, s in found.lora.items() if KINDS.get(t) == k) for k in kinds}
    level["other"] = mean(found.lora.values())
    out: dict[str, Any] = {"_": {
        "made by": "python benchmarks/quality.py", "tasks": {t: KINDS.get(t) for t in found.lora},
        "m": round(at.m, 5), "omega": round(at.omega, 5), "tau": round(at.tau, 5),
        "left out": regrets(found), "date": max(r.date for r in records)}}
    rates: dict[str, dict[str, float]] = {}
    for r in records:
        if r.budget == "as_is" and r.scores:
            rates.setdefault("lora" if r.recipe in LORA else r.recipe, {})[r.task] = r.rate
    order = [t for t in TASKS if t in found.lora]
    for recipe in sorted(rates):
        by = found.of.get(recipe, {}) if recipe != "lora" else {}
        score = {}
        for k in [*kinds, "other"]:
            gain, sd = expected(by, at, None if k == "other" else k) if recipe != "lora" \
                else (0.0, 0.0)
            score[k] = [round(min(1.0, level[k] + gain), 4), round(sd, 4)]
        ran = [t for t in order if t in rates[recipe]]
        said = ", ".join(ran)
        out[recipe] = {"score": score, "learning_rate": {t: float(f"{rates[recipe][t]:.3g}")
                                                         for t in ran},
                       "source": f"the board: {said}"}
    return out
