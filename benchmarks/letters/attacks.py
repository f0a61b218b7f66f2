"""Pictures made from a public encoder alone, and what they do to models tuned from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .letter import Claim, Letter, Row, Rows, number, one, percent

RECIPES = {"linear_probe": 1e-2, "lora(rank=8)": 3e-3, "full": 1e-3}
BUDGETS, STEPS, EPOCHS, TEST = (0.05, 0.1, 0.2), 5, 2, 200
WAYS = {"random": "random signs", "encoder": "from the base alone", "whole": "from the model"}


def rows() -> Iterator[Row]:
    import burnish
    from burnish.fit import attacks
    from burnish.fit.assets import GLYPH_VIT
    from burnish.fit.finished import Finished

    with tempfile.TemporaryDirectory() as folder:
        for k, (recipe, rate) in enumerate(RECIPES.items()):
            at = Path(folder) / str(k)
            burnish.fit(str(GLYPH_VIT), "digits", recipe, output=at, quiet=True, report=False,
                        test=False, epochs=EPOCHS, learning_rate=rate, seed=0)
            run = Finished.open(at)
            run.chosen("digits", "test", {})
            task = run.task
            task.ready(run.tuned, "cpu", 64)
            task.data.splits["test"] = task.data.splits["test"].select(range(TEST))
            for budget in BUDGETS:
                found = attacks.audit(run.tuned, task, "test", budget=budget, steps=STEPS)
                yield {"table": f"pixels moved by {budget:g} at most", "how": recipe,
                       "trained": sum(p.numel() for p in run.tuned.parameters()),
                       **{way: round(f["accuracy"], 4) for way, f in found.items()}}


def lost(row: Row, way: str) -> float:
    return row["clean"] - row[way]


def each(holds: Callable[[Row], bool], said: Callable[[Row], str]
         ) -> Callable[[Rows], tuple[bool, str]]:
    def found(rows: Rows) -> tuple[bool, str]:
        return all(map(holds, rows)), "; ".join(said(r) for r in rows)

    return found


def lead(first: str, second: str) -> Callable[[Rows], tuple[bool, str]]:
    """Does the first lose less than the second to pictures of the base alone, at every budget?"""
    def found(rows: Rows) -> tuple[bool, str]:
        tables = dict.fromkeys(r["table"] for r in rows)
        pairs = [[lost(one(rows, how, table=t), "encoder") for how in (first, second)]
                 for t in tables]
        return all(a < b for a, b in pairs), "; ".join(
            f"{100 * a:.1f} beside {100 * b:.1f}" for a, b in pairs)

    return found


PROBE, LORA, FULL = RECIPES
LETTER = Letter(
    title="Attacks from a public encoder",
    words=f"""
Whoever has the base of a run, and neither its tuned weights nor its head, moves pictures so that
the base's features go as far as they can, {STEPS} steps of projected gradient ascent; the tuned
model then reads them. The glyph transformer is tuned on scikit-learn's scanned digits,
{EPOCHS} passes, at rates that were fixed beforehand (1e-2 of a head, 3e-3 of factors, 1e-3 of whole
weights), and answers {TEST} test scans: per cent right as they are, after random signs of the same
size, after what was made from the base alone, and after the same ascent by one who has the tuned
model, on its loss against what it answers. Pixels are from 0 to 1. One seed. On a command line it
is `burnish audit RUN DATA --attack 0.1` ([safety after tuning](../guide/safety.md)).""",
    belongs=None, rows=rows,
    columns={"clean": percent("clean"), **{said: percent(way) for way, said in WAYS.items()},
             "trained": number("trained")},
    claims=(
        Claim("Pictures made from the base alone take more than random signs of the same size do, "
              "whatever was tuned",
              each(lambda r: r["encoder"] < r["random"],
                   lambda r: f"{100 * r['encoder']:.1f} beside {100 * r['random']:.1f}")),
        Claim("They take less than one who has the tuned model",
              each(lambda r: r["encoder"] > r["whole"],
                   lambda r: f"{100 * r['encoder']:.1f} beside {100 * r['whole']:.1f}")),
        Claim("They take at least half of what one who has the tuned model takes",
              each(lambda r: lost(r, "encoder") >= lost(r, "whole") / 2,
                   lambda r: f"{100 * lost(r, 'encoder'):.1f} of {100 * lost(r, 'whole'):.1f}")),
        Claim("Weights that have moved further lose less: a LoRA less than a head alone",
              lead(LORA, PROBE)),
        Claim("All weights less than a LoRA", lead(FULL, LORA))),
    after="""
None of these runs was made to resist, and they differ in how much of the encoder could move. Small
changes mislead a head on the public features most, since these are its features too; at the largest
size of change there is little to choose between knowing the base and knowing all. The ascent on the
model's own loss is one of few steps: more of them would take more.""")
