"""The board as a page: for each budget a table, who can be told apart, and the frontier.

Ranks are taken on each task (the best score has rank 1, equal ones share theirs) and averaged over
tasks. Whether recipes differ at all is Friedman's test; two differ where their mean ranks are
further apart than the critical difference of Nemenyi,

    CD = q_0.05 sqrt(k (k + 1) / (6 N))

for k recipes on N tasks, q of the studentised range over sqrt(2) (Demsar, Statistical Comparisons
of Classifiers over Multiple Data Sets, JMLR 7, 2006). Only recipes that ran on all tasks are
ranked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from ..core.errors import ConfigError
from ..core.extras import worded
from .budgets import BUDGETS, YARDSTICK
from .records import Record, Records
from .tasks import TASKS

WORDS = {"as_is": "Defaults", "parameters": "Equal trained parameters", "peak": "Equal peak",
         "time": "Equal time"}
#: the yardstick under its own name and as it is usually typed
LORA = ("lora", YARDSTICK)
LEVEL = 0.05
#: the task whose bytes and trained numbers are told
FACTS = "text"


@dataclass(frozen=True)
class Ranking:
    """recipe -> mean rank over tasks, the best first, and its mean scores in the order of tasks."""

    tasks: tuple[str, ...]
    ranks: dict[str, float]
    scores: dict[str, list[float]]

    @worded()
    def differ(self) -> tuple[float, float] | None:
        """(p of Friedman's test, critical difference); None for fewer than three recipes or two
        tasks."""
        k, n = len(self.ranks), len(self.tasks)
        if k < 3 or n < 2:
            return None
        from scipy.stats import friedmanchisquare, studentized_range

        columns = [self.scores[name] for name in self.ranks]
        tied = all(len({c[i] for c in columns}) == 1 for i in range(n))
        p = 1.0 if tied else float(friedmanchisquare(*columns).pvalue)
        # beyond some thousand degrees of freedom the quantile no longer moves
        q = float(studentized_range.ppf(1 - LEVEL, k, 100_000)) / math.sqrt(2)
        return p, q * math.sqrt(k * (k + 1) / (6 * n))


def ranking(found: Sequence[Record]) -> Ranking:
    """Of the recipes that have scores on every task that occurs."""
    scored = [r for r in found if r.scores]
    tasks = tuple(t for t in TASKS if any(r.task == t for r in scored))
    by: dict[str, dict[str, float]] = {}
    for r in scored:
        by.setdefault(r.recipe, {})[r.task] = mean(r.scores)
    whole = {n: s for n, s in by.items() if len(s) == len(tasks)}
    ranks = {n: mean(_rank(s[t], [o[t] for o in whole.values()]) for t in tasks)
             for n, s in whole.items()}
    return Ranking(tasks, dict(sorted(ranks.items(), key=lambda item: item[1])),
                   {n: [s[t] for t in tasks] for n, s in whole.items()})


def _rank(own: float, all_: Sequence[float]) -> float:
    above = sum(x > own for x in all_)
    same = sum(x == own for x in all_)
    return above + (same + 1) / 2


def page(records: Records) -> str:
    """Markdown. Raises ConfigError where no run has scores."""
    if not any(r.scores for r in records):
        raise ConfigError("no run here has scores; burnish bench RECIPE ... makes some")
    out = ["# The board", "",
           "Scores in per cent of right answers (of classes, of the next byte), mean ± standard "
           "deviation over seeds, each recipe at the learning rate that is best on validation "
           "rows. `burnish bench` makes the runs and this page.", ""]
    for budget in BUDGETS:
        found = [r for r in records if r.budget == budget]
        if any(r.scores for r in found):
            out += [f"## {WORDS[budget]}", "", *_section(found), ""]
    return "\n".join(out)


def _section(found: Sequence[Record]) -> list[str]:
    placed = ranking(found)
    out = table(found)
    if (told := placed.differ()) is not None:
        p, apart = told
        best = next(iter(placed.ranks))
        near = sum(r - placed.ranks[best] <= apart for r in placed.ranks.values()) - 1
        out += ["", f"{len(placed.ranks)} recipes on {len(placed.tasks)} tasks: Friedman's p = "
                f"{p:.2g}; mean ranks less than {apart:.1f} apart are not told "
                f"apart at {LEVEL}: `{best}` is not from {near} of {len(placed.ranks) - 1} others."]
    front = frontier(found)
    if len(front) > 1:
        out += ["", "Nothing here is both better and smaller than "
                + ", ".join(f"`{n}` ({100 * s:.1f} at {p:.2f})" for n, p, s in front)
                + " (mean score; peak beside LoRA's, geometric mean)."]
    refused = sorted((r for r in found if r.refused), key=lambda r: (r.recipe, r.task))
    if refused:
        out += ["", "Not run:", "",
                *(f"- `{r.recipe}` on {r.task}: {r.refused}" for r in refused)]
    return out


def table(found: Sequence[Record], among: Sequence[Record] = ()) -> list[str]:
    """Lines of Markdown, a recipe each, the best mean rank first. among: the runs among which those
    shown are ranked; default those alone."""
    placed = ranking(among or found)
    by: dict[str, dict[str, Record]] = {}
    for r in found:
        if r.scores:
            by.setdefault(r.recipe, {})[r.task] = r
    base = next((rows for n in LORA if (rows := {r.task: r for r in among or found if r.scores
                                                 and r.recipe == n})), {})
    at = FACTS if FACTS in placed.tasks else next(iter(placed.tasks), "")

    def key(name: str) -> tuple[float, int, float]:
        rows = [mean(r.scores) for r in by[name].values()]
        return placed.ranks.get(name, math.inf), -len(rows), -mean(rows)

    out = [f"| recipe | {' | '.join(placed.tasks)} | rank | trained | promised | peak | step |",
           "|---" * (len(placed.tasks) + 6) + "|"]
    for name in sorted(by, key=key):
        rows = by[name]
        cells = [percent(rows[t].scores) if t in rows else "" for t in placed.tasks]
        cells.append(f"{placed.ranks[name]:.1f}" if name in placed.ranks else "")
        told = rows.get(at)
        cells += [f"{told.trained:,}", f"{told.promised / 2**20:.2f} MiB",
                  f"{told.peak / 2**20:.2f} MiB"] if told else ["", "", ""]
        out.append(f"| `{name}` | {' | '.join([*cells, _times(rows, base)])} |")
    return [*out, "", "rank: mean over tasks. Trained numbers and the peak of a step, promised and "
            f"measured, are those of {at}; step: processor time beside LoRA's (geometric mean)."]


def points(found: Sequence[Record]) -> list[tuple[str, float, float]]:
    """(recipe, peak beside LoRA's, mean score) of the recipes that ran on every task."""
    placed = ranking(found)
    by = {(r.recipe, r.task): r for r in found if r.scores}
    base = next((n for n in LORA if all((n, t) in by for t in placed.tasks)), None)
    if base is None:
        return []
    return [(n, math.prod(by[n, t].peak / by[base, t].peak for t in placed.tasks)
             ** (1 / len(placed.tasks)), mean(mean(by[n, t].scores) for t in placed.tasks))
            for n in placed.ranks if all(by[n, t].peak for t in placed.tasks)]


def frontier(found: Sequence[Record]) -> list[tuple[str, float, float]]:
    """Of the points those that no other beats in both, the least peak first."""
    all_ = points(found)
    return sorted((a for a in all_ if not any(
        b[1] <= a[1] and b[2] >= a[2] and (b[1], b[2]) != (a[1], a[2]) for b in all_)),
        key=lambda a: a[1])


def percent(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    said = f"{100 * mean(scores):.1f}"
    return said + (f" ± {100 * stdev(scores):.1f}" if len(scores) > 1 else "")


def _times(rows: dict[str, Record], base: dict[str, Record]) -> str:
    """Processor time of an update beside LoRA's, the geometric mean over tasks."""
    both = [r.step_s / base[t].step_s for t, r in rows.items()
            if t in base and base[t].step_s and r.step_s]
    return f"{math.prod(both) ** (1 / len(both)):.2f}" if both else ""
