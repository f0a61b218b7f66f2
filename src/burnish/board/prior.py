"""What recipes may be expected to reach on a task nobody has run: the planner's prior.

The score of recipe r, LoRA among them, on task t is taken as

    y_rt = l_t + a_r + b_rt + e_rt,   a ~ N(0, omega^2),  b ~ N(0, tau^2),  e ~ N(0, s_rt^2)

with s_rt^2 the variance of the mean over seeds. l_t is how the recipes do on task t at large:
where LoRA does poorly all of them gain on it, and who ran there alone owes that to the task. The
l_t are the weighted means (generalised least squares) under the omega and tau that make the scores
likeliest (restricted likelihood). What is ten points behind LoRA or ahead of it counts as ten. A
kind of task that was measured is expected at the mean of a_r + b_rt over its tasks, any other at
a_r, each with its standard deviation; the gain of a recipe is its expectation less LoRA's.

Whether that helps is told by leaving a task out: of the recipes that ran on it, the one with the
best expectation from the others is held against the best there was (the regret), and the order of
all of them against that which they had.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, variance
from typing import Any

from ..core.extras import worded
from .page import LORA
from .records import Records
from .tasks import KINDS, TASKS

MOST = 0.1
#: seeds leave out what other test rows would do
FLOOR = 0.002


@dataclass(frozen=True)
class Gains:
    """recipe -> task -> (gain over LoRA, variance of its own mean), LoRA too, and LoRA's scores."""

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
    lora = {t: mean(s) for t, s in scores.get("lora", {}).items()}

    def gain(s: list[float], t: str) -> tuple[float, float]:
        return (min(MOST, max(-MOST, mean(s) - lora[t])),
                (variance(s) / len(s) if len(s) > 1 else 0.0) + FLOOR ** 2)

    return Gains({name: {t: gain(s, t) for t, s in by.items() if t in lora}
                  for name, by in scores.items()}, lora)


@dataclass(frozen=True)
class Spread:
    """omega and tau of above, and l_t as a gain over LoRA's score."""

    levels: dict[str, float]
    omega: float
    tau: float


def spread(found: Gains) -> Spread:
    """The likeliest, on a grid."""
    import numpy as np

    rows = [by for by in found.of.values() if by]
    tasks = list(found.lora)
    g, s2 = (np.array([[by[t][k] if t in by else np.nan for t in tasks] for by in rows])
             for k in (0, 1))
    y = np.nan_to_num(g)
    grid = [0.0, *np.geomspace(0.001, 0.1, 25)]
    best, out = -np.inf, Spread({}, 0.0, 0.01)
    for omega in grid:
        for tau in grid[1:]:
            # the inverse of diag(1 / d) + omega^2 11^T by Sherman and Morrison, a recipe a row
            d = np.nan_to_num(1 / (tau ** 2 + s2))
            shrink = omega ** 2 / (1 + omega ** 2 * d.sum(1))
            weigh = np.diag(d.sum(0)) - (d * shrink[:, None]).T @ d
            levels = np.linalg.solve(weigh, (d * (y - (shrink * (d * y).sum(1))[:, None])).sum(0))
            x = y - levels
            likely = -0.5 * ((d * x * x).sum() - (shrink * (d * x).sum(1) ** 2).sum()
                             - np.log(d[d > 0]).sum() + np.log1p(omega ** 2 * d.sum(1)).sum()
                             + np.linalg.slogdet(weigh)[1])
            if likely > best:
                best = likely
                out = Spread(dict(zip(tasks, levels.tolist(), strict=True)), float(omega),
                             float(tau))
    return out


def expected(by: dict[str, tuple[float, float]], at: Spread, kind: str | None = None
             ) -> tuple[float, float]:
    """(a_r + b_rt, standard deviation) of one recipe on a kind of task; None: on any other."""
    import numpy as np

    tasks = list(by)
    own = [t for t in tasks if kind is not None and KINDS.get(t) == kind]
    prior = at.omega ** 2 + (at.tau ** 2 / len(own) if own else at.tau ** 2)
    if not tasks:
        return 0.0, prior ** 0.5
    x = np.array([by[t][0] - at.levels[t] for t in tasks])
    cov = np.full((len(tasks), len(tasks)), at.omega ** 2)
    cov += np.diag([at.tau ** 2 + by[t][1] for t in tasks])
    cross = np.array([at.omega ** 2 + (at.tau ** 2 / len(own) if t in own else 0) for t in tasks])
    weights = np.linalg.solve(cov, cross)
    return float(weights @ x), float(max(prior - weights @ cross, 0.0) ** 0.5)


def over(found: Gains, at: Spread, recipe: str, level: float, kind: str | None) -> list[float]:
    """The score where LoRA has `level`, and the standard deviation of the gain."""
    (own, sd), (lora, sd_lora) = (expected(found.of.get(r, {}), at, kind) for r in (recipe, "lora"))
    return [min(1.0, level + own - lora), (sd ** 2 + sd_lora ** 2) ** 0.5]


def regrets(found: Gains) -> dict[str, dict[str, Any]]:
    """task -> who would have been chosen, what is lost by it, and what by always taking LoRA."""
    out = {}
    for task in found.lora:
        here = {r: by[task][0] for r, by in found.of.items() if task in by}
        rest = found.without(task)
        if not any(rest.of.values()):
            continue
        at = spread(rest)
        wish = {r: expected(rest.of[r], at, KINDS.get(task))[0] for r in here if rest.of[r]}
        best, chosen = max(here, key=here.__getitem__), max(wish, key=wish.__getitem__)
        out[task] = {"chosen": chosen, "best": best,
                     "regret": round(here[best] - here[chosen], 4),
                     "of_lora": round(here[best], 4),
                     "order": _alike([wish[r] for r in wish], [here[r] for r in wish])}
    return out


@worded()
def _alike(a: list[float], b: list[float]) -> float:
    """Spearman's correlation of ranks; 0 where either has one rank alone."""
    from scipy.stats import spearmanr

    flat = len(set(a)) < 2 or len(set(b)) < 2
    return 0.0 if flat else round(float(spearmanr(a, b).statistic), 2)


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
        "levels": {t: round(v, 5) for t, v in at.levels.items()},
        "omega": round(at.omega, 5), "tau": round(at.tau, 5),
        "left out": regrets(found), "date": max(r.date for r in records)}}
    rates: dict[str, dict[str, float]] = {}
    for r in records:
        if r.budget == "as_is" and r.scores:
            rates.setdefault("lora" if r.recipe in LORA else r.recipe, {})[r.task] = r.rate
    order = [t for t in TASKS if t in found.lora]
    for recipe in sorted(rates):
        score = {k: [level[k], 0.0] if recipe == "lora" else
                 over(found, at, recipe, level[k], None if k == "other" else k)
                 for k in [*kinds, "other"]}
        ran = [t for t in order if t in rates[recipe]]
        out[recipe] = {"score": {k: [round(v, 4) for v in pair] for k, pair in score.items()},
                       "learning_rate": {t: float(f"{rates[recipe][t]:.3g}") for t in ran},
                       "source": f"the board: {', '.join(ran)}"}
    return out
