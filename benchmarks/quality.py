"""The planner's prior of quality, made of the runs of the board.

    python benchmarks/quality.py            # board/ -> src/burnish/memory/quality.json

What it is, and what it loses on a task that it has not seen: src/burnish/board/prior.py.
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "src" / "burnish" / "memory" / "quality.json"


def made() -> str:
    """The document, of the runs that are in the repository."""
    from burnish.board import Records
    from burnish.board.prior import prior

    return json.dumps(prior(Records.read(HERE / "board")), indent=1) + "\n"


def main() -> None:
    OUT.write_text(made(), "utf-8")
    left = json.loads(OUT.read_text("utf-8"))["_"]["left out"]
    print("| left out | chosen without it | best | lost | lost by LoRA | order |\n"
          "|---|---|---|---|---|---|")
    for task, d in left.items():
        print(f"| {task} | `{d['chosen']}` | `{d['best']}` | {100 * d['regret']:.1f} | "
              f"{100 * d['of_lora']:.1f} | {d['order']:+.2f} |")


if __name__ == "__main__":
    main()
