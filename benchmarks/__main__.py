"""``python -m benchmarks``: the rows the README of this folder is about, then the table."""

from __future__ import annotations

import datetime
from pathlib import Path

from . import steps

ROWS = ["peft:lora", "burnish:lora(rank=8)", "burnish:snella(rank=8)", "peft:dora",
        "burnish:dora(rank=8)", "peft:lora+ckpt", "burnish:lora(rank=8) + checkpoint"]


def main() -> None:
    out = Path(__file__).parent / "results" / f"steps-{datetime.date.today().isoformat()}.jsonl"
    for model in ("vit", "llama"):
        steps.run(model, ROWS, 2, 0, out)
    steps.table(out)


if __name__ == "__main__":
    main()
