"""Accuracy against the measured peak of recipes of every axis, and what the planner chooses there.

    python benchmarks/frontier.py --out frontier.jsonl
    python docs/pictures.py frontier frontier.jsonl

On the board's handwriting (five seeds at the rate best on validation). Runs that benchmarks/board
holds are taken from there, the others are run. Then, at five budgets between the
least and the largest peak, the planner is asked without any of these figures, its first choice is
run like every other recipe, and held against the best of all that fit the budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from forked import rows

from burnish.board import Records, Task, run, task

NAME = "handwriting"
RECIPES = (
    "linear_probe", "bitfit", "norms", "full",                                     # what trains
    "lora", "lora(rank=16)", "dora", "pissa", "vera", "snella", "snella(magnitude='linear')",
    "shira", "miss", "oft", "adalora", "hra",                                      # on weights
    "houlsby", "ssf", "ia3", "prefix", "vpt",                                      # beside them
    "lst", "unipt", "sherl",                                                       # at the side
    "lora + checkpoint", "lora + coded", "lora + lean", "full + checkpoint",       # the tape
    "nf4 + lora", "nf4 + lora + checkpoint", "nf4 + snella + checkpoint", "rtn(bits=4) + lora",
    "full + galore(rank=16)", "full + adam8bit", "lisa(layers=1)", "badam",        # the update
    "full + mezo", "lora + mezo")
BUDGETS = 5


def choices(found: list[dict[str, Any]], own: Task, tried: Any) -> list[dict[str, Any]]:
    """The planner's first choice at each budget beside the best that was tried."""
    import burnish

    peaks = [r["peak"] for r in found]
    low, high = 1.05 * min(peaks), 1.05 * max(peaks)
    batch, out = own.first(own.batch), []
    for k in range(BUDGETS):
        budget = int(low * (high / low) ** (k / (BUDGETS - 1)))
        best = burnish.plan(own.fresh().train(), memory=budget, batch=batch, loss=own.loss,
                            **own.how).best
        fits = [r for r in found if r["peak"] <= budget]
        top = max(fits, key=lambda r: r["mean"])
        row = {"budget": budget, "best": top["recipe"], "best_accuracy": top["mean"],
               "tried": len(fits)}
        if best is not None:
            tuned = burnish.tune(own.fresh().train(), best.recipe,
                                 calibration=own.epoch("train", 0)[:4], **own.how)
            tuned.optimizer(own.rate, accumulation=best.accumulate)
            real = burnish.measure(tuned, own.first(best.batch), own.loss,
                                   accumulation=best.accumulate)
            row |= {"chosen": best.recipe, "batch": [best.batch, best.accumulate],
                    "accuracy": tried(best.recipe).get("mean"), "promised": best.peak_bytes,
                    "peak": real.peak_bytes}
        out.append(row)
    return out


def told(r: Any) -> dict[str, Any]:
    """A run as a row."""
    return {"mean": statistics.mean(r.scores), "sd": statistics.stdev(r.scores), **r.to_dict()}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, default=Path("frontier.jsonl"))
    ask.add_argument("--workers", type=int, default=2)
    a = ask.parse_args()
    import torch

    from burnish.fit.driving import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)

    def held() -> dict[str, dict[str, Any]]:
        lines = [json.loads(x) for x in a.out.read_text().splitlines()] if a.out.is_file() else []
        return {r["recipe"]: r for r in lines if "recipe" in r}

    have = held()
    with a.out.open("a") as f:
        for r in Records.read(Path(__file__).with_name("board")):
            if (r.task, r.budget) == (NAME, "as_is") and r.recipe in set(RECIPES) - set(have) \
                    and r.scores:
                f.write(json.dumps(told(r)) + "\n")
    made = task(NAME)

    def tried(*recipes: str) -> dict[str, Any]:
        rows([{"recipe": r} for r in recipes], lambda recipe: told(run(made, recipe)), str(a.out),
             a.workers)
        return held()[recipes[-1]]

    tried(*RECIPES)
    found = [r for r in held().values() if r["recipe"] in RECIPES and "mean" in r]
    with a.out.open("a") as f:
        for choice in choices(found, made, tried):
            f.write(json.dumps(choice) + "\n")
            print(f"{choice['budget'] / 1e6:7.2f} MB  {choice.get('chosen')}: "
                  f"{choice.get('accuracy')} at {choice.get('peak')}; "
                  f"best of {choice['tried']}: {choice['best']}: {choice['best_accuracy']}")


if __name__ == "__main__":
    main()
