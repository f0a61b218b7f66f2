"""Write docs/board.md: the runs of benchmarks/board as tables. Run by `make docs`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from burnish.board import Record, Records, page
from burnish.board.prior import prior

HERE = Path(__file__).resolve().parent
PAGE = HERE / "board.md"
RUNS = HERE.parent / "benchmarks" / "board"
#: the flagship, and what it is held against at equal parameters
EQUAL = [("snella", "lora", r) for r in (8, 16, 32)] + [("snell", "lora", r) for r in (8, 16, 32)]


def read() -> Records:
    return Records.read(RUNS)


def flagship(records: Records) -> list[str]:
    """Gains in points of accuracy."""
    by: dict[str, dict[str, Record]] = {}
    for r in records:
        if r.budget == "as_is" and r.scores:
            by.setdefault(r.recipe, {})[r.task] = r
    rows = []
    for ours, theirs, rank in EQUAL:
        a, b = (by.get(n if rank == 8 else f"{n}(rank={rank})", {}) for n in (ours, theirs))
        if both := [t for t in a if t in b]:
            gains = ", ".join(f"{t} {100 * (mean(a[t].scores) - mean(b[t].scores)):+.1f}"
                              for t in both)
            rows.append(f"| `{ours}` | `{theirs}` | {rank} | {gains} |")
    return ["## SNELL and SNELLA beside LoRA at equal parameters", "",
            "| | LoRA | rank | gain in points |", "|---|---|---|---|", *rows, ""]


def expectation(records: Records) -> list[str]:
    """What the planner's prior loses where it has not seen the task."""
    found = prior(records)["_"]
    out = ["## What the planner makes of it", "",
           "Plans expect of a recipe what it reached on tasks of the same kind, drawn towards what "
           "recipes reach in general, how hard each task was set apart: recipes differ by "
           f"{100 * found['omega']:.1f} points whatever the task, and by {100 * found['tau']:.1f} "
           "more from task to task. Leaving a task out, and taking the recipe that the others "
           "recommend (the order is Spearman's correlation of what was expected of all recipes "
           "with what they reached):", "",
           "| left out | taken | best | lost | lost by always taking LoRA | order |",
           "|---|---|---|---|---|---|"]
    out += [f"| {t} | `{d['chosen']}` | `{d['best']}` | {100 * d['regret']:.1f} | "
            f"{100 * d['of_lora']:.1f} | {d['order']:+.2f} |"
            for t, d in found["left out"].items()]
    return [*out, ""]


def write(records: Records) -> str:
    return "\n".join([page(records), *flagship(records), *expectation(records)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write(read()), encoding="utf-8")
