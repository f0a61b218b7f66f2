"""Numbers in words, written in figures: five ways to teach what stands behind a text.

    python examples/numerals.py [TASK ...]        # all five; half a minute each

instruction-tuning: a decoder that has read how numbers are said is asked for them.
preference-tuning: one that writes them exactly or rounded, as it comes, is told which is liked.
sequence-to-sequence: an encoder-decoder (BART). masked-instruction-tuning: an encoder that answers
behind its mask. masked-language-modelling: one that fills any gap. The numbers of
validation are in no row that is learnt. The models are drawn at random and learn from nothing but
these rows: nothing is downloaded. With rows of your own it is ``burnish fit --model m/qwen --data
pairs.jsonl``.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from taught import miniature, taught, words

SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def said(n: int) -> str:
    if n < 20:
        return SMALL[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {SMALL[n % 10]}" if n % 10 else "")
    return f"{SMALL[n // 100]} hundred" + (f" and {said(n % 100)}" if n % 100 else "")


def figures(n: int) -> str:
    return " ".join(str(n))


def rows(count: int, task: str) -> list[dict[str, Any]]:
    drawn = random.Random(0).sample(range(100, 1000), count)
    if task == "preference-tuning":
        return [{"prompt": f"{said(n)} is ", "chosen": figures(n),
                 "rejected": figures(n // 100 * 100)} for n in drawn if n % 100]
    if task == "masked-language-modelling":
        return [{"text": f"{said(n)} is {figures(n)}"} for n in drawn]
    return [{"prompt": f"{said(n)} is ", "completion": figures(n)} for n in drawn]


#: task -> the kind of model, and what stands about a text
MODELS = {"instruction-tuning": ("decoder", ""), "preference-tuning": ("decoder", ""),
          "sequence-to-sequence": ("encoder-decoder", "$A </s>"),
          "masked-instruction-tuning": ("encoder", ""),
          "masked-language-modelling": ("encoder", "")}
ASKED = ("three hundred and forty two is ", "six hundred and nine is ")


def main(task: str, count: int = 640, epochs: int = 12) -> dict[str, float]:
    kind, ends = MODELS[task]
    known = words([*map(said, range(1000)), "is", figures(1234567890)], ends=ends)
    how = {"lr": 3e-3, "batch_size": 32, "epochs": epochs}
    ask = [a + "<mask>" * 3 for a in ASKED] if kind == "encoder" else list(ASKED)
    if task == "masked-language-modelling":           # few words are hidden in a pass
        how |= {"max_length": 24, "epochs": 4 * epochs}
        ask = ["three hundred and <mask> two is 3 4 2", "six hundred and nine is 6 <mask> 9"]
    with miniature(kind, known) as drawn, tempfile.TemporaryDirectory() as folder:
        if task != "preference-tuning":
            return taught(rows(count, task), drawn, "full", task=task, ask=ask, **how)
        some = rows(count, task)
        both = [{"prompt": r["prompt"], "completion": r[k]} for r in some
                for k in ("chosen", "rejected")]
        taught(both, drawn, "full", keep=Path(folder), **how)
        return taught(some, folder, ask=ask, **how | {"lr": 1e-3, "epochs": 1})


if __name__ == "__main__":
    for task in sys.argv[1:] or MODELS:
        main(task)
