"""Write down words whose letters are tones, with a decoder: Whisper's architecture, whole.

    python examples/dictation.py               # under a minute

The recordings are synthesised: five texts, spelt in tones of unlike length, in noise; and the model
is drawn at random: nothing is downloaded. With recordings of your own it is
``burnish fit --model m/whisper-small --data clips/ --language german``, with a `metadata.csv` in
`clips/`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import burnish
from burnish.testing.sounds import WRITES, letters, made, spelt

SAID = ("a", "bc", "ca b", "bb", "acc")


def main(each: int = 160, epochs: int = 16, recipe: str = "full") -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), spelt(Path(folder, "clips"), each, among=SAID)
        for part in (*made(WRITES), letters()):
            part.save_pretrained(model)
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=5e-3,
                          epochs=epochs, batch_size=16, language="english", quiet=True)
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
