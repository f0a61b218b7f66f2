"""Few tokens: steps and evaluations of a small classifier, turn by turn with what they are held
against, one fresh process per row (see README.md).

    python benchmarks/few.py --out few.jsonl
    python benchmarks/few.py --table few.jsonl
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: (what, subject, beside, the bar for the ratio of their times)
ROWS = [
    ("step", "burnish:lora(rank=8)", "peft:lora", 0.95),
    ("step", "burnish:full", "torch:full", 1.03),
    ("step", "burnish:snella(rank=8)", "burnish:lora(rank=8)", 1.3),
    ("step", "burnish:lora(rank=8, dropout=0.1)", "peft:lora+dropout", 0.95),
    ("evaluate", "burnish:snella(rank=8)", "torch:full", 1.02),
    ("evaluate", "burnish:lora(rank=8)", "torch:full", 1.02),
]


def classifier(layers: int, hidden: int) -> Any:
    """MiniLM's shape: 6 layers, hidden 384; BERT-base's: 12, 768. Weights are random."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=4 * hidden,
        num_labels=4, attn_implementation="sdpa", hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0))


def built(name: str, layers: int, hidden: int) -> Any:
    import torch

    model, (library, _, what) = classifier(layers, hidden), name.partition(":")
    if library == "peft":
        import peft

        linears = [n for n, m in model.named_modules()
                   if isinstance(m, torch.nn.Linear) and n != "classifier"]
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=linears, modules_to_save=["classifier"],
            lora_dropout=0.1 if what.endswith("dropout") else 0.0))
    elif library == "burnish":
        import burnish

        burnish.tune(model, what)
    return model


def runner(what: str, name: str, samples: int, tokens: int, layers: int = 6, hidden: int = 384
           ) -> Callable[[], None]:
    """One step, or one evaluation."""
    import torch

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30522, (samples, tokens), generator=g)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
             "labels": torch.randint(0, 4, (samples,), generator=g)}
    model = built(name, layers, hidden)
    if what == "evaluate":
        model.eval()

        def evaluate() -> None:
            with torch.no_grad():
                model(**batch)
        return evaluate
    model.train()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4,
                            fused=True)

    def step() -> None:
        opt.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        opt.step()
    return step


def row(what: str, subject: str, beside: str, bar: float, turns: int, *shape: int
        ) -> dict[str, Any]:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    runs = [runner(what, name, *shape) for name in (subject, beside)]
    wall: list[list[float]] = [[], []]
    busy: list[list[float]] = [[], []]
    for turn in range(turns + 3):
        for k in ((0, 1), (1, 0))[turn % 2]:
            w, c = time.perf_counter(), time.process_time()
            runs[k]()
            if turn >= 3:
                wall[k].append(time.perf_counter() - w)
                busy[k].append(time.process_time() - c)
    low = [statistics.quantiles(t, n=10)[0] for t in busy]
    return {"what": what, "subject": subject, "beside": beside, "bar": bar,
            **dict(zip(("samples", "tokens", "layers", "hidden"), shape, strict=True)),
            "x": low[0] / low[1], "x_min": min(busy[0]) / min(busy[1]),
            "x_wall": min(wall[0]) / min(wall[1]),
            "x_median": statistics.median(wall[0]) / statistics.median(wall[1]),
            "ms": 1e3 * low[0], "beside_ms": 1e3 * low[1], "turns": turns,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "machine": platform.machine(),
            "date": datetime.date.today().isoformat()}


def table(path: str) -> None:
    print("| what | of | beside | ms | x | bar |\n|---|---|---|---|---|---|")
    for line in Path(path).read_text().splitlines():
        d = json.loads(line)
        print(f"| {d['what']} | `{d['subject']}` | `{d['beside']}` | {d['ms']:.1f} "
              f"| {d['x']:.2f} | {d['bar']} |")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--out", default="few.jsonl")
    ask.add_argument("--table", help="print a table of a results file")
    ask.add_argument("--rows", default="", help="numbers of rows, from 0; default: all")
    ask.add_argument("--samples", type=int, default=32)
    ask.add_argument("--tokens", type=int, default=24)
    ask.add_argument("--layers", type=int, default=6)
    ask.add_argument("--hidden", type=int, default=384)
    ask.add_argument("--turns", type=int, default=40)
    ask.add_argument("--note", default="", help="a word that is written beside each row")
    ask.add_argument("--here", type=int, help=argparse.SUPPRESS)
    a = ask.parse_args()
    shape = a.samples, a.tokens, a.layers, a.hidden
    if a.table:
        table(a.table)
        return
    if a.here is not None:
        print(json.dumps(row(*ROWS[a.here], a.turns, *shape)))
        return
    for k in [int(n) for n in a.rows.split(",")] if a.rows else range(len(ROWS)):
        own = [sys.executable, __file__, "--here", str(k), "--turns", str(a.turns),
               "--samples", str(a.samples), "--tokens", str(a.tokens), "--layers", str(a.layers),
               "--hidden", str(a.hidden)]
        found = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout
        line = json.dumps({**json.loads(found.splitlines()[-1]), "note": a.note})
        with open(a.out, "a") as f:
            f.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
