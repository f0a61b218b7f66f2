"""One token through two 1024 x 1024 layers, one fresh process per recipe (see README.md).

    python benchmarks/tokens.py "lora(rank=8)" "snell(rank=8)" --cached 64MiB
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time


def one(recipe: str, cached: str | None, tokens: int) -> dict:
    import torch
    from torch import nn

    import burnish
    from burnish.memory import MemoryReport
    from burnish.memory.ledger import Ledger

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)), torch.randn(1, 1024)

    def times() -> list[float]:
        with torch.no_grad():
            for _ in range(3):
                model(x)
            found = []
            for _ in range(tokens):
                start = time.perf_counter()
                model(x)
                found.append(1e3 * (time.perf_counter() - start))
        return found

    plain = times()
    tuned = burnish.tune(model, recipe, targets="0,1", head=False)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    model.eval()
    limit = contextlib.nullcontext() if cached is None else tuned.cached(cached)
    with limit:
        taken = times()
        tuned.model.eval()                       # nothing is kept when the ledger begins
        ledger = Ledger(model)
        with ledger, torch.no_grad():
            for _ in range(3):
                model(x)
        peak = MemoryReport.of(ledger, device="cpu").peak_bytes
    return {"recipe": recipe, "cached": cached, "base ms": min(plain), "ms": min(taken),
            "median ms": statistics.median(taken), "peak MiB": peak / 2**20,
            "torch": torch.__version__, "python": platform.python_version(),
            "machine": platform.machine(), "date": datetime.date.today().isoformat()}


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("recipes", nargs="+")
    ask.add_argument("--cached", help="as for tuned.cached; default: nothing is said")
    ask.add_argument("--tokens", type=int, default=50)
    ask.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    a = ask.parse_args()
    if a.here:
        print(json.dumps(one(a.recipes[0], a.cached, a.tokens)))
        return
    for recipe in a.recipes:
        own = [sys.executable, __file__, recipe, "--tokens", str(a.tokens), "--here"]
        own += [] if a.cached is None else ["--cached", a.cached]
        print(subprocess.run(own, check=True, capture_output=True, text=True).stdout, end="",
              flush=True)


if __name__ == "__main__":
    main()
