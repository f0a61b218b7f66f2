"""Time of an optimizer's update beside torch's fused AdamW, one fresh process per row (README.md).

Both step the same tensors with the same gradients, turn by turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROWS = ["adamw", "lion", "sgd(momentum=0.9)", "adafactor", "adamw(state='bf16')", "adam8bit",
        "adam4bit", "kahan", "master_weights", "stochastic_rounding", "galore(rank=128)",
        "galore(rank=128) + adam8bit", "apollo(rank=128)", "fira(rank=128)", "kahan + lion",
        "stochastic_rounding + adam8bit", "kahan + adam8bit", "mezo"]
#: these are about weights of half precision; fused AdamW steps the same ones
HALF = ("kahan", "master_weights", "stochastic_rounding")


def vit():
    """Shapes of ViT-B/16 with a head of 100 classes."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(num_labels=100))


def lora():
    """A (8, in) and B (out, 8) of each linear of its blocks."""
    linears = [m for n, m in vit().named_modules()
               if type(m).__name__ == "Linear" and "classifier" not in n]
    return [s for m in linears for s in ((8, m.in_features), (m.out_features, 8))]


def full():
    return [tuple(p.shape) for p in vit().parameters()]


def large():
    return [(4096, 4096)] * 2 + [(4096, 1024)] * 2


SETS = {"lora": lora, "full": full, "large": large}


def parameters(shapes, dtype):
    import torch

    g = torch.Generator().manual_seed(0)
    made = []
    for i, shape in enumerate(shapes):
        p = torch.nn.Parameter(torch.randn(shape, generator=g).mul_(0.02).to(dtype))
        p.grad = torch.randn(shape, generator=g).mul_(1e-3).to(dtype)
        made.append((f"blocks.{i}.weight", p))
    return made


def stepper(recipe, named):
    """One update, as a call."""
    from burnish.blocks.update.step import compose
    from burnish.core.recipe import parse

    opt = compose([m.optimizer() for m in parse(recipe)], named, 1e-4)
    if not getattr(opt, "zeroth_order", False):
        return opt.step
    losses = iter(range(1 << 40))
    return lambda: opt.step(lambda: float(next(losses) % 7))


def row(which, recipe, repeats):
    """Measure in this process; prints one JSON line."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    dtype = torch.bfloat16 if any(h in recipe for h in HALF) else torch.float32
    shapes = SETS[which]()
    theirs = torch.optim.AdamW([p for _, p in parameters(shapes, dtype)], lr=1e-4, fused=True)
    own = parameters(shapes, dtype)
    for p, (_, q) in zip(theirs.param_groups[0]["params"], own, strict=True):
        p.grad = q.grad
    calls = {"fused_s": theirs.step, "step_s": stepper(recipe, own)}
    times = {k: [] for k in calls}
    for _ in range(repeats + 2):
        for k, call in calls.items():
            t0 = time.perf_counter()
            call()
            times[k].append(time.perf_counter() - t0)
    best = {k: min(v[2:]) for k, v in times.items()}
    n = sum(p.numel() for _, p in own)
    print(json.dumps({
        "set": which, "recipe": recipe, "dtype": str(dtype).split(".")[1], "tensors": len(own),
        "elements": n, **best, "x_fused": best["step_s"] / best["fused_s"],
        "ns_per_element": best["step_s"] / n * 1e9, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(),
        "device": platform.processor() or platform.machine()}))


def table(path):
    """Markdown, the last row of each recipe and set."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        d = json.loads(line)
        rows.setdefault(d["recipe"], {})[d["set"]] = d
    counts = Counter(s for r in rows.values() for s in r)
    sets = [s for s in SETS if counts[s]]
    print("| recipe | weights | " + " | ".join(f"{s}: x fused | ns" for s in sets) + " |")
    print("|---|---|" + "---|---|" * len(sets))
    for recipe, of in rows.items():
        cells = [f"{of[s]['x_fused']:.2f} | {of[s]['ns_per_element']:.2f}" if s in of else " | "
                 for s in sets]
        dtype = next(iter(of.values()))["dtype"]
        print(f"| `{recipe}` | {dtype} | " + " | ".join(cells) + " |")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("recipes", nargs="*", default=ROWS)
    ap.add_argument("--sets", default=",".join(SETS))
    ap.add_argument("--repeats", type=int, default=15)
    ap.add_argument("--out", default="updates.jsonl")
    ap.add_argument("--row", action="store_true", help="measure in this process")
    ap.add_argument("--table", help="print a table of a results file")
    a = ap.parse_args()
    if a.table:
        return table(a.table)
    for which in a.sets.split(","):
        for recipe in a.recipes:
            if a.row:
                row(which, recipe, a.repeats)
                continue
            done = subprocess.run(
                [sys.executable, __file__, "--row", "--sets", which, "--repeats", str(a.repeats),
                 recipe], capture_output=True, text=True)
            if done.returncode:
                print(which, recipe, "failed:", done.stderr.strip().splitlines()[-1:])
                continue
            line = done.stdout.strip().splitlines()[-1]
            with open(a.out, "a") as f:
                f.write(line + "\n")
            d = json.loads(line)
            print(f"{which:6} {recipe:34} {d['x_fused']:7.2f} x   {d['ns_per_element']:7.2f} ns",
                  flush=True)
    return None


if __name__ == "__main__":
    main()
