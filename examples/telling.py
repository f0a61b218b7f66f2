"""Say what is on a picture: an encoder of pictures with a decoder of words.

    python examples/telling.py               # about a minute

Pictures of nine kinds ("a red disc") are drawn, anywhere, in noise, and the model at random:
nothing is downloaded. With pictures of your own it is
``burnish fit --model m/vit-gpt2 --data photos/``, with a `metadata.csv` of `file_name` and `text`
in `photos/`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.captions import WRITES, captioned, made


def main(each: int = 30, epochs: int = 16, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), captioned(Path(folder, "photos"), each)
        for part in made(WRITES):
            part.save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, batch_size=18, quiet=True)
        asked = [str(data / f"{i}.png") for i in (0, 4, 8)]
        for answer in Finished.open(run.folder).predict(asked):
            print(f"{Path(answer['input']).name}: {answer['said']}")
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
