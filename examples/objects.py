"""Find discs and boxes in pictures: object detection, as DETR learns it.

    python examples/objects.py               # about a minute

Pictures with one disc or box, or one of each, are drawn, and a small YOLOS at random: nothing is
downloaded. With pictures of your own it is ``burnish fit --model m/yolos --data yard/``, with
`images/` and an `annotations.json` of COCO's form in `yard/`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.boxes import made, shapes


def main(each: int = 270, epochs: int = 36, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), shapes(Path(folder, "yard"), each)
        for part in made():
            part.save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, batch_size=16, quiet=True)
        asked = [str(data / "images" / f"{i}.png") for i in range(3)]
        for answer in Finished.open(run.folder).predict(asked):
            print(f"{Path(answer['input']).name}: {answer['said']}")
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
