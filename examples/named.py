"""Draw the mask of what a text names: CLIPSeg, from pictures with masks and texts to a mask.

    python examples/named.py                 # a minute

Pictures of two shapes are drawn, each with the mask of either and its name, and a small CLIPSeg is
made at random: nothing is downloaded. With pictures of your own it is ``burnish fit --model
CIDAS/clipseg-rd64-refined --data polyps/ --recipe "tunevlseg(strategy='vpt')"``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.captions import DRAWS, made, named
from burnish.testing.tasks import kept


def main(pictures: int = 60, epochs: int = 60, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = kept(Path(folder), *made(DRAWS)), named(Path(folder, "shapes"), pictures)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, quiet=True)
        line = (data / "metadata.csv").read_text().splitlines()[1].split(",")
        for answer in Finished.open(run.folder).predict([str(data / line[0]), line[2]]):
            print(f"{line[2]}: {answer['said']}")
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
