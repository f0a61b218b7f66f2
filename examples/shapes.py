"""Make boxes, crosses and discs out of noise: a small pipeline of diffusers, taught classes.

    pip install diffusers
    python examples/shapes.py                 # a minute or two

Pictures are drawn and the model begins at random: nothing is downloaded. With a pipeline and
pictures of your own it is ``burnish fit --model m/dit --data pictures/``, with a folder of
pictures for each class in `pictures/`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.pipelines import CLASSES, pipeline, shapes


def main(each: int = 60, epochs: int = 12, kind: str = CLASSES, recipe: str = "full"
         ) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), shapes(Path(folder, "shapes"), each)
        pipeline(kind).save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, batch_size=18, quiet=True)
        for answer in Finished.open(run.folder).predict(["box", "cross", "disc"]):
            print(f"{answer['input']}: {Path(answer['picture']).name}")
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
