"""Tell discs from boxes, pixel by pixel: semantic segmentation of pictures with masks.

    python examples/pixels.py                 # half a minute

Pictures and masks are drawn, in noise and over each other, and the SegFormer that reads them is
drawn at random: nothing is downloaded. With pictures of your own it is ``burnish fit --model
m/segformer --data scenes/``, where `scenes/` holds `images/`, `masks/` and `classes.txt`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.testing.scenes import segformer, shapes


def main(each: int = 80, epochs: int = 6, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), shapes(Path(folder, "scenes"), each)
        (data / "classes.txt").write_text("floor\ndisc\nbox\n")
        for part in segformer():
            part.save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=4e-3,
                          epochs=epochs, batch_size=8, validation=0.25, quiet=True)
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
