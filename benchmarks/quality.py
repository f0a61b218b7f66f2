"""The planner's prior of quality, read from what `transfers.py` measured.

    python benchmarks/quality.py benchmarks/results/transfers-*.jsonl

A recipe's score is LoRA's accuracy, the mean over the transfers, and the mean of what the recipe is
above it on those that it acts on (a network of linears has no norm to train); one of the three may
be missing.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "src" / "burnish" / "memory" / "quality.json"
TRANSFERS = ("handwriting", "text", "tables")


def prior(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """recipe -> score, rates and where they come from."""
    found: dict[str, dict[str, Any]] = {}
    for row in lines:
        if "mean" in row:
            found.setdefault(row["recipe"], {})[row["transfer"]] = row
    lora = {t: found["lora"][t]["mean"] for t in TRANSFERS}
    out: dict[str, Any] = {"_": {"made by": "python benchmarks/quality.py",
                                 "transfers": list(TRANSFERS), "seeds": 5,
                                 "date": max(r["date"] for r in lines)}}
    for recipe, rows in sorted(found.items()):
        acts = [t for t in TRANSFERS if t in rows]
        if len(acts) < 2:
            continue
        gain = statistics.mean(rows[t]["mean"] - lora[t] for t in acts)
        said = ", ".join(f"{t} {100 * rows[t]['mean']:.1f}" for t in acts)
        out[recipe] = {"score": round(statistics.mean(lora.values()) + gain, 4),
                       "learning_rate": {t: float(f"{rows[t]['rate']:.3g}") for t in acts},
                       "source": f"accuracy in per cent on {len(acts)} transfers: {said}"}
    return out


if __name__ == "__main__":
    made = prior([json.loads(line) for name in sys.argv[1:]
                  for line in Path(name).read_text().splitlines()])
    OUT.write_text(json.dumps(made, indent=1) + "\n")
