"""Tell solids by files of points, from folders as ModelNet has them to an answer.

    python examples/solids.py                # a minute

Spheres, saddles and tori are sampled and written as .xyz, .ply and .npy into a folder for each, and
a small point transformer is saved with its code beside its weights, as a model of one's own is: a
configuration and a model that are registered for their Auto classes. Nothing is downloaded. With
clouds of your own it is ``burnish fit --model m/points --data ModelNet10/ --trust_remote_code
true``.
`examples/surfaces.py` compares recipes on such a model in a loop of one's own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.own import clouds, made

KINDS = ("sphere", "saddle", "torus")


def main(each: int = 60, epochs: int = 30, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), Path(folder, "solids")
        clouds(data, each, KINDS, points=128)
        made("cloud", groups=16).save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), points=96,
                          epochs=epochs, lr=2e-3, validation=0.2, quiet=True,
                          trust_remote_code=True)
        some = [str(next((data / kind).iterdir())) for kind in KINDS]
        for answer in Finished.open(run.folder, trust=True).predict(some):
            print(f"{Path(answer['input']).parent.name}: {answer['said']}")
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
