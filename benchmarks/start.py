"""What a user waits for before and beside a step, each in a fresh process (see README.md).

    python benchmarks/start.py [import tune vocabulary] [--out FILE]

import: ``import burnish`` over ``import torch`` (bar 0.3 s). tune: ``tune`` of ViT-B/16 (bar 1 s).
vocabulary: a step whose loss is taken by chunks beside the same step with whole logits (bar 1.05).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

#: (words, tokens, hidden, layers) of the language models whose losses are compared
SHAPES = [(32000, 1024, 512, 4), (128256, 512, 512, 4)]


def imported(turns: int) -> dict[str, Any]:
    """Shortest processor time of as many fresh interpreters, turn by turn."""
    def busy(words: str) -> float:
        told = subprocess.run([sys.executable, "-c", f"import time\n{words}\n"
                               "print(time.process_time())"], check=True, text=True,
                              stdout=subprocess.PIPE).stdout
        return float(told)

    both = [(busy("import torch"), busy("import torch, burnish")) for _ in range(turns)]
    torch_s, all_s = (min(t) for t in zip(*both, strict=True))
    return {"what": "import", "torch_s": torch_s, "with_burnish_s": all_s,
            "over_s": all_s - torch_s, "bar_s": 0.3, "turns": turns}


def tuned(recipe: str, turns: int) -> dict[str, Any]:
    """Processor time of ``tune``: the first in its process, and the shortest."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    import burnish

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, took = ViTForImageClassification(ViTConfig(num_labels=100)), []
    for _ in range(turns):
        began = time.process_time()
        handle = burnish.tune(model, recipe)
        took.append(time.process_time() - began)
        handle.detach()
    return {"what": "tune", "recipe": recipe, "first_s": took[0], "least_s": min(took),
            "bar_s": 1.0, "turns": turns}


def vocabulary(words: int, tokens: int, hidden: int, layers: int, turns: int) -> dict[str, Any]:
    """A step with and one without the loss by chunks, turn by turn; peaks are the ledger's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import burnish

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = LlamaConfig(vocab_size=words, hidden_size=hidden, num_hidden_layers=layers,
                         intermediate_size=3 * hidden, num_attention_heads=8, use_cache=False,
                         tie_word_embeddings=True, attn_implementation="sdpa")
    ids = torch.randint(0, words, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    recipes = "lora(rank=8) + chunked_loss", "lora(rank=8)"
    models = []
    for recipe in recipes:
        torch.manual_seed(0)
        models.append(burnish.tune(LlamaForCausalLM(config).train(), recipe))
    busy: list[list[float]] = [[], []]
    for turn in range(turns + 1):
        for k in ((0, 1), (1, 0))[turn % 2]:
            began = time.process_time()
            models[k].step(batch)
            if turn:
                busy[k].append(time.process_time() - began)
    peaks = []
    for recipe in recipes:
        with torch.device("meta"):
            empty = LlamaForCausalLM(config).train()
        peaks.append(burnish.simulate(empty, recipe, batch).peak_bytes)
    return {"what": "vocabulary", "words": words, "tokens": tokens, "hidden": hidden,
            "layers": layers, "x": min(busy[0]) / min(busy[1]),
            "x_median": statistics.median(busy[0]) / statistics.median(busy[1]),
            "s": min(busy[0]), "plain_s": min(busy[1]), "peak": peaks[0], "plain_peak": peaks[1],
            "bar": 1.05, "turns": turns}


def rows(names: list[str], turns: int) -> list[list[str]]:
    """The words for a process of each row."""
    found = []
    for name in names:
        if name == "import":
            found.append(["import"])
        elif name == "tune":
            found += [["tune", r] for r in ("lora(rank=8)", "snella(rank=8)")]
        else:
            found += [["vocabulary", *map(str, shape)] for shape in SHAPES]
    return [[*words, str(turns)] for words in found]


def here(what: str, *words: str) -> dict[str, Any]:
    """One row, in this process."""
    if what == "import":
        return imported(int(words[0]))
    if what == "tune":
        return tuned(words[0], int(words[1]))
    return vocabulary(*map(int, words))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("names", nargs="*", default=["import", "tune", "vocabulary"])
    ask.add_argument("--out", default="start.jsonl")
    ask.add_argument("--turns", type=int, default=5)
    ask.add_argument("--here", nargs="+", help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.here:
        print(json.dumps(here(*a.here)))
        return
    import torch

    about = {"torch": torch.__version__, "python": platform.python_version(),
             "machine": platform.machine(), "threads": os.environ.get("OMP_NUM_THREADS", "1"),
             "date": datetime.date.today().isoformat()}
    for words in rows(a.names, a.turns):
        told = subprocess.run([sys.executable, __file__, "--here", *words], check=True, text=True,
                              stdout=subprocess.PIPE).stdout
        line = json.dumps({**json.loads(told.splitlines()[-1]), **about})
        with open(a.out, "a") as f:
            f.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
