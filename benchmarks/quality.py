"""The planner's prior of quality, from measured runs: ``python benchmarks/quality.py``.

Every recipe is fitted as a row of ``burnish demo``: the glyph model, the digits, the same
splits, batch, epochs and seed, one learning rate each (the middle one of the demo's where it has
that row). The score is accuracy on the test split. Rows are written as they end, so a run that is
cut short leaves what it has measured.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "src" / "burnish" / "memory" / "quality.json"
EPOCHS = 8

#: recipe -> learning rate; keys are the heads the planner knows
RATES: dict[str, float] = {
    "linear_probe": 1e-1, "bitfit": 1e-2, "ssf": 1e-2, "lora": 3e-3, "dora": 3e-3,
    "pissa(rank=16)": 1e-3, "snella": 5e-3, "houlsby": 3e-3, "vpt": 3e-2, "full": 1e-3,
    "lst(reduction=8)": 3e-3, "lisa(layers=2)": 1e-3, "full + galore(rank=128)": 1e-3,
    "norms": 1e-2, "miss": 3e-3, "shira": 3e-3, "ia3": 3e-2,
}


def main(only: list[str]) -> None:
    import torch

    from burnish.fit.demo import row

    found = json.loads(OUT.read_text()) if OUT.is_file() else {}
    found["_"] = {"made by": "python benchmarks/quality.py", "task": "digits on the glyph model",
                  "epochs": EPOCHS, "torch": torch.__version__,
                  "date": datetime.date.today().isoformat()}
    for recipe in only or RATES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = row(recipe, [RATES[recipe]], folder, EPOCHS)
            except Exception as e:                       # a recipe the small model refuses
                print(f"{recipe}: {type(e).__name__}: {e}", flush=True)
                continue
        found[recipe] = {
            "score": round(made["accuracy"], 4), "learning_rate": RATES[recipe],
            "source": f"digits, {EPOCHS} epochs, test accuracy {100 * made['accuracy']:.2f} %",
        }
        OUT.write_text(json.dumps(found, indent=1) + "\n")
        print(recipe, found[recipe]["score"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
