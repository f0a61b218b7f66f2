"""What is on a picture of figures: a class, several, a number, or what is like it.

    python examples/digits.py [TASK ...]          # all four; half a minute each

image-classification: which figure it is. image-multi-label: whether it is even, has a ring
and is above four. image-regression: how far it is turned, in radians. image-embedding: a
direction, close to those of the same figure. The scans are scikit-learn's, and the vision
transformer has learnt printed letters and ships with burnish: nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits
from taught import taught

from burnish.fit.assets import GLYPH_VIT

MARKS = {"even": "02468", "ring": "0689", "above four": "56789"}


def rows(task: str, count: int) -> list[tuple[Any, Any]]:
    """Pictures of 16 by 16 with what is to be said of them."""
    digits, draw, found = load_digits(), random.Random(0), []
    scans = [Image.fromarray((255 - 15.9 * d).astype("uint8")) for d in digits.images]
    for i in draw.sample(range(len(scans)), count):
        picture, said = scans[i].resize((16, 16), Image.Resampling.BICUBIC), str(digits.target[i])
        if task == "image-multi-label":
            said = [mark for mark, of in MARKS.items() if said in of]
        elif task == "image-regression":
            angle = draw.uniform(-1.0, 1.0)
            picture = picture.rotate(angle * 57.3, Image.Resampling.BICUBIC, fillcolor=255)
            said = round(angle, 4)
        found.append((picture, said))
    return found


def main(task: str, count: int = 900, epochs: int = 5, recipe: str = "lora(rank=8)"
         ) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for i, (picture, said) in enumerate(rows(task, count)):
            picture.save(Path(folder, f"{i}.png"))
            lines.append(json.dumps({"file_name": f"{i}.png", "label": said}))
        Path(folder, "metadata.jsonl").write_text("\n".join(lines))
        asked = {"task": task} if task == "image-embedding" else {}
        return taught(Path(folder), GLYPH_VIT, recipe, lr=3e-3, epochs=epochs, batch_size=32,
                      **asked)


if __name__ == "__main__":
    for task in sys.argv[1:] or [f"image-{k}" for k in ("classification", "multi-label",
                                                        "regression", "embedding")]:
        main(task)
