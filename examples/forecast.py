"""Foretell a series: PatchTST, from a CSV to the next rows.

    python examples/forecast.py              # about a minute

Two series that lean on each other are synthesised, an hour a row, and a small PatchTST is drawn at
random: nothing is downloaded, and nothing is said of real series. With a CSV of your own it is
``burnish fit --model m/patchtst --data load.csv``. `examples/series.py` compares recipes on a model
that has learnt other series before.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.series import made, written


def main(steps: int = 600, epochs: int = 12, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), written(Path(folder, "heat.csv"), steps)
        made().save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, batch_size=32, quiet=True)
        for answer in Finished.open(run.folder).predict([str(data)]):
            print(answer["said"])
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
