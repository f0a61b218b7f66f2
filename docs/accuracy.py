"""Write docs/accuracy.md: three transfers, from benchmarks/results. Run by `make docs`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "accuracy.md"
RESULTS = HERE.parent / "benchmarks" / "results"
TRANSFERS = ("handwriting", "text", "tables")
#: the flagship, and what it is held against at equal parameters
EQUAL = [("snella", "lora", r) for r in (8, 16, 32)] + [("snell", "lora", r) for r in (8, 16, 32)]

Rows = dict[str, dict[str, dict[str, Any]]]


def read() -> Rows:
    """recipe -> transfer -> its newest row."""
    found: Rows = {}
    for file in sorted(RESULTS.glob("transfers-*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["recipe"], {})[row["transfer"]] = row
    return found


def whole(rows: dict[str, dict[str, Any]]) -> bool:
    return all("mean" in rows.get(t, {}) for t in TRANSFERS)


def percent(row: dict[str, Any]) -> str:
    return f"{100 * row['mean']:.1f} ± {100 * row['sd']:.1f}" if "mean" in row else ""


def table(some: Rows, found: Rows) -> list[str]:
    """Lines of a table of recipes, the best mean first. found: all there are, LoRA among them."""
    out = ["| recipe | handwriting | text | tables | trained | peak | measured | step / LoRA's |",
           "|---|---|---|---|---|---|---|---|"]
    base = found.get("lora", {}).get("text", {}).get("step_s")

    def key(item: tuple[str, dict[str, dict[str, Any]]]) -> tuple[bool, float]:
        made = [r["mean"] for r in item[1].values() if "mean" in r]
        return not whole(item[1]), -mean(made) if made else 0.0

    for recipe, rows in sorted(some.items(), key=key):
        if not any("mean" in r for r in rows.values()):
            continue
        told = rows.get("text", {})
        cells = [percent(rows.get(t, {})) for t in TRANSFERS]
        facts = ["", "", "", ""]
        if "mean" in told:
            facts = [f"{told['trained']:,}", f"{told['promised'] / 2**20:.1f} MiB",
                     f"{told['peak'] / 2**20:.1f} MiB",
                     f"{told['step_s'] / base:.2f}" if base else ""]
        out.append(f"| `{recipe}` | {' | '.join(cells + facts)} |")
    return out


def write(found: Rows) -> str:
    """The page: a line per recipe, the best mean first, then the flagship at equal parameters."""
    out = ["# Accuracy of methods", "",
           "Test accuracy in per cent, mean ± standard deviation of five seeds, at the rate "
           "that is best on validation, on three transfers of different kinds: rendered print "
           "to scanned handwriting (a small vision transformer), docstrings by package (all-"
           "MiniLM-L6-v2, 20 rows a class) and cells of breast cancer (a small network, 60 "
           "rows). Trained parameters, peaks and step times are those of the text transfer; a "
           "peak is simulated, then measured. Settings are each method's defaults: nothing "
           "here was tuned but the learning rate. `benchmarks/transfers.py` makes it.", "",
           *table(found, found)]
    out += ["", "A new head has a rate of its own, the same for all. An empty cell: not run, or "
            "a method that does not act on that model.", "",
            "## SNELL and SNELLA beside LoRA at equal parameters", "",
            "| | LoRA | rank | handwriting | text | tables |", "|---|---|---|---|---|---|"]
    for ours, theirs, rank in EQUAL:
        a, b = (found.get(n if rank == 8 else f"{n}(rank={rank})", {}) for n in (ours, theirs))
        if whole(a) and whole(b):
            gains = [f"{100 * (a[t]['mean'] - b[t]['mean']):+.1f}" for t in TRANSFERS]
            out.append(f"| `{ours}` | `{theirs}` | {rank} | {' | '.join(gains)} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write(read()), encoding="utf-8")
