"""How much of which data: three sets of texts mixed for a fourth, foretold from small runs (DaMo).

    python examples/mixture.py

The sets are first sentences of docstrings, lines that define functions, and numbers in words and
figures. What is wanted are docstrings and numbers, of which none is learnt. A decoder of bytes
learns from some rows of each of several mixtures; a surface over the shares foretells the best one,
and a longer run on that is held beside one on equal shares, on rows that chose nothing. With files
of your own it is ``burnish mix m/llama a.jsonl b.jsonl c.jsonl --held wanted.jsonl --out
mixed.jsonl``.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from library import functions
from numerals import said

import burnish

LENGTH, BATCH = 64, 16


def sets() -> dict[str, list[str]]:
    numbers = random.Random(0).sample(range(1000), 1000)
    return {"docstrings": [f.doc.partition(". ")[0][:LENGTH] for f in functions()],
            "definitions": [f"def {f.name}({f.takes}):"[:LENGTH] for f in functions()],
            "numerals": [f"{said(n)} is {n}"[:LENGTH] for n in numbers]}


def batch(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Bytes behind a beginning (1), 0 behind their end."""
    rows = [[1, *t.encode("ascii", "replace")] for t in texts]
    ids = torch.tensor([r + [0] * (LENGTH + 1 - len(r)) for r in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(),
            "labels": ids.masked_fill(ids == 0, -100)}


def decoder() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=LENGTH + 1, pad_token_id=0, bos_token_id=1,
        eos_token_id=None))


@torch.no_grad()
def bits(model: Any, texts: Sequence[str]) -> float:
    """Per character of these texts."""
    model.eval()
    lost = characters = 0.0
    for i in range(0, len(texts), 4 * BATCH):
        some = texts[i:i + 4 * BATCH]
        n = sum(map(len, some))
        lost, characters = lost + n * float(model(**batch(some)).loss), characters + n
    return lost / characters / math.log(2)


def main(count: int = 960, trials: int = 12, longer: int = 3) -> dict[str, float]:
    """count: rows of a small run; those that are compared at the end have `longer` times as many.
    """
    data, start = sets(), decoder()
    wanted = [t for name in ("docstrings", "numerals") for t in data[name][:100]]
    held, last = wanted[::2], wanted[1::2]
    learnt = {name: [t for t in texts if t not in wanted] for name, texts in data.items()}

    def train(rows: Sequence[str]) -> Any:
        tuned = burnish.tune(copy.deepcopy(start), "full")
        tuned.optimizer(lr=3e-3)
        for i in range(0, len(rows) - BATCH + 1, BATCH):
            tuned.step(batch(rows[i:i + BATCH]))
        return tuned.model

    (damo,) = burnish.parse(f"damo(trials={trials})")
    found = damo.lifecycle(learnt, train, lambda model, texts: -bits(model, texts), held=held,
                           count=count)
    print(found)
    shares = {"equal": dict.fromkeys(learnt, 1 / len(learnt)), "chosen": found.chosen}
    told = {name: bits(train(damo.rows(learnt, longer * count, w)), last)
            for name, w in shares.items()}
    print("chosen: " + ", ".join(f"{n} {w:.0%}" for n, w in found.chosen.items()))
    print("; ".join(f"{name} shares: {b:.3f} bits a character" for name, b in told.items()))
    return told | {f"share_of_{n}": w for n, w in found.chosen.items()}


if __name__ == "__main__":
    main()
