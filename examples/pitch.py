"""Tell tones an octave apart: audio classification of WAV files in class folders.

    python examples/pitch.py                  # half a minute

The recordings are synthesised, of unlike length and pitch and in noise, and the spectrogram
transformer that hears them is drawn at random: nothing is downloaded. With recordings and a model
of your own it is ``burnish fit --model m/ast --data sounds/``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.testing.sounds import AST, made, tones


def main(each: int = 60, epochs: int = 6, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), tones(Path(folder, "tones"), each)
        for part in made(AST):
            part.save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=2e-3,
                          epochs=epochs, batch_size=16, validation=0.25, quiet=True)
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
