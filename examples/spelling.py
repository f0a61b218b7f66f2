"""Spell words whose letters are tones: speech recognition with a CTC head.

    python examples/spelling.py               # half a minute

The recordings are synthesised, with letters of unlike length, rests between words and noise, and
the wav2vec2 that hears them is drawn at random: nothing is downloaded. With recordings of your own
it is ``burnish fit --model m/wav2vec2 --data clips/``, with a `metadata.csv` in `clips/`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.testing.sounds import CTC, made, spelt


def main(each: int = 200, epochs: int = 12, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), spelt(Path(folder, "clips"), each)
        for part in made(CTC):
            part.save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=6e-3,
                          epochs=epochs, batch_size=16, quiet=True)
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
