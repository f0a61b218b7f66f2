"""Match pictures with what is said of them: two towers, as CLIP has them, learnt from pairs.

    python examples/matching.py               # under a minute

Pictures of nine kinds ("a red disc") are drawn, anywhere, in noise, and the model at random:
nothing is downloaded. With pictures of your own it is
``burnish fit --model m/clip --data photos/``, with a `metadata.csv` of `file_name` and `text` in
`photos/`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.fit.finished import Finished
from burnish.testing.captions import CLIP, captioned, made


def main(each: int = 24, epochs: int = 12, kind: str = CLIP, recipe: str = "full"
         ) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), captioned(Path(folder, "photos"), each)
        for part in made(kind):
            part.save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, batch_size=18, quiet=True)
        asked = [str(data / "0.png"), str(data / "4.png"), "a red disc", "a green box"]
        for answer in Finished.open(run.folder).predict(asked):
            print(f"{Path(answer['input']).name}: {answer['said'].replace(f'{data}/', '')}")
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
