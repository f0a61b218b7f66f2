"""``burnish demo``: from print to handwriting, within a budget, everything measured.

A small vision transformer that has only ever seen rendered glyphs (it ships with the package,
`scripts/pretrain_glyphs.py` made it) is tuned to the 1,797 scanned handwritten digits of
scikit-learn. First a plan within a budget of memory; then SNELLA beside the usual rows: a linear
probe, LoRA, full fine-tuning. Each row runs in a process of its own, so that no figure leans on
another row; its learning rate is the one of three that is best on the validation split, and the
test split is read once, with that one.

A demo that only looked right would be worth nothing, so it ends in checks: SNELLA above the probe
and within a point of the best row, every promise of memory within 3 % of what was measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, CheckError
from ..formats import claim, safe, staged
from ..memory import format_bytes
from .assets import GLYPH_VIT

#: what the plan at the start is asked for
BUDGET = "22MB"
BATCH, EPOCHS, SEED = 32, 8, 0

#: recipe -> the learning rates tried; each method around its own usual place, three each
ROWS: dict[str, tuple[float, ...]] = {
    "snella(rank=8)": (5e-3, 1e-2, 2e-2),
    "linear_probe": (1e-2, 3e-2, 1e-1),
    "lora(rank=8)": (1e-3, 3e-3, 1e-2),
    "full": (3e-4, 1e-3, 3e-3),
}
#: what is planned among (the whole shelf takes a minute, see `burnish plan`)
CANDIDATES = (*ROWS, "snella(rank=8) + checkpoint", "full + checkpoint", "lora(rank=8) + lean",
              "lst", "bitfit")
CHOSEN = "snella(rank=8)"
#: how far a promise of memory may be off, and how far SNELLA may stand below the best row
PROMISE, POINT = 0.03, 0.01

COLUMNS = ("recipe", "test accuracy", "validation", "trained", "promised", "measured", "off by",
           "process grew by", "learning rate", "seconds")


@dataclass
class Demo:
    """rows: one per recipe, as in the table.  checks: (what, whether it holds)."""

    folder: Path
    rows: list[dict[str, Any]]
    checks: list[tuple[str, bool]]
    plan: dict[str, Any] = field(repr=False, default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "rows": self.rows, "plan": self.plan,
                "checks": [{"what": w, "holds": h} for w, h in self.checks],
                "seconds": self.seconds}

    def __str__(self) -> str:
        cells = [list(COLUMNS), *table(self.rows)]
        widths = [max(len(r[i]) for r in cells) for i in range(len(COLUMNS))]
        lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                           for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
                 for r in cells]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        lines += ["", *[f"{'holds' if h else 'FAILS'}: {w}" for w, h in self.checks],
                  f"{self.seconds:.0f} s; report: {self.folder / 'report.html'}"]
        return "\n".join(lines)


def demo(output: str | Path = "demo-out", memory: str | int = BUDGET, *, quiet: bool = False,
         rows: Mapping[str, Sequence[float]] | None = None, epochs: int = EPOCHS) -> Demo:
    """Plan within `memory`, fit every row, compare, check, and write the report.

    rows: recipe -> learning rates to choose among; default ROWS.
    Raises CheckError (after everything is written) when one of the checks fails, BurnishError when
    a row cannot be run.
    """
    output = Path(output)
    claim.refuse_foreign(output, ("demo.json", "report.html"), "demo")
    with claim.lock(output):
        return _demo(output, memory, quiet, rows, epochs)


def _demo(output: Path, memory: str | int, quiet: bool, rows: Mapping[str, Sequence[float]] | None,
          epochs: int) -> Demo:
    began = time.perf_counter()
    rates = dict(ROWS if rows is None else rows)

    def say(text: str = "") -> None:
        if not quiet:
            print(text, flush=True)

    say(f"plan: recipes for the glyph transformer on digits, batch {BATCH}, within {memory}")
    plans = planned(memory)
    say(plans.text(rows=8))
    say(f"\nfit: {len(rates)} recipes, {epochs} epochs at each of their learning rates, every row "
        "in its own process")
    found = []
    for row in run_rows(rates, output, epochs):
        found.append(row)
        say(f"  {row['recipe']}: {100 * row['accuracy']:.2f} % on test "
            f"(lr {row['learning_rate']:g}), {format_bytes(row['measured'])}")
    found.sort(key=lambda r: list(rates).index(r["recipe"]))
    done = Demo(output, found, checks(found), plans.to_dict(), 0.0)
    write(done, plans)
    done.seconds = time.perf_counter() - began
    with staged.update(output, "demo") as new:
        safe.write_json(new / "demo.json", done.to_dict())
    say()
    say(str(done))
    failed = [w for w, h in done.checks if not h]
    if failed:
        raise CheckError(f"the demo ran, but this does not hold: {'; '.join(failed)}")
    return done


def planned(memory: str | int) -> Any:
    """Which of the rows fit, with and without checkpointing, and the leanest of the shelf: each a
    simulation of the real step of the shipped model."""
    from ..memory import plan
    from .data import read
    from .driving import quiet_libraries
    from .tasks import task_for

    quiet_libraries()
    task = task_for(read("digits"), str(GLYPH_VIT))
    return plan(task.load(str(GLYPH_VIT)), memory=memory, batch=task.example(BATCH),
                candidates=CANDIDATES)


def checks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    by_name = {r["recipe"]: r for r in rows}
    out = []
    if CHOSEN in by_name:
        ours, best = by_name[CHOSEN], max(r["accuracy"] for r in rows)
        probe = by_name.get("linear_probe")
        if probe:
            out.append((f"{CHOSEN} above the linear probe ({100 * ours['accuracy']:.2f} against "
                        f"{100 * probe['accuracy']:.2f} %)", ours["accuracy"] > probe["accuracy"]))
        out.append((f"{CHOSEN} within {100 * POINT:.0f} point of the best row "
                    f"({100 * best:.2f} %)", ours["accuracy"] >= best - POINT))
    worst = max(rows, key=lambda r: abs(r["difference"]))
    out.append((f"promises of memory within {100 * PROMISE:.0f} % of what was measured (at most "
                f"{100 * abs(worst['difference']):.2f} % off, {worst['recipe']})",
                abs(worst["difference"]) <= PROMISE))
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[r["recipe"], f"{100 * r['accuracy']:.2f} %", f"{100 * r['validation']:.2f} %",
             f"{r['trained']:,}", format_bytes(r["simulated"]), format_bytes(r["measured"]),
             f"{100 * r['difference']:+.2f} %", format_bytes(r["grew"]),
             f"{r['learning_rate']:g}", f"{r['seconds']:.1f}"] for r in rows]


def write(done: Demo, plans: Any) -> None:
    """One page: the comparison on top, then the chosen row's own report."""
    from .data import read
    from .report import write_report

    chosen = next((r for r in done.rows if r["recipe"] == CHOSEN), done.rows[0])
    facts = safe.read_json(Path(chosen["folder"]) / "run.json")
    extra = safe.read_json(Path(chosen["folder"]) / "history.json")
    facts["layers"], facts["model"] = extra["layers"], "glyph-vit"
    fits = f"{len(plans.fits)} recipes fit {format_bytes(plans.budget)}"
    best = f"; first among them {plans.best.recipe}" if plans.best else ""
    tried = "; ".join(f"{r['recipe']}: {', '.join(f'{x:g}' for x in r['tried'])}"
                      for r in done.rows)
    notes = [
        f"Each row ran in its own process: {facts['training']['num_train_epochs']} epochs, batch "
        f"{BATCH}, the learning rate best on validation of those tried ({tried}). Test rows were "
        "read once, with that one.",
        f"Planned beforehand: {fits}{best}.",
        *[f"{'Holds' if h else 'Fails'}: {w}." for w, h in done.checks],
    ]
    page = write_report(
        facts, extra["history"], data=read("digits"), title="From print to handwriting",
        comparison={"title": "Four ways to tune, measured alike", "columns": COLUMNS,
                    "table": table(done.rows), "rows": done.rows, "notes": notes})
    with staged.update(done.folder, "demo") as new:
        safe.write_text(new / "report.html", page)


# -- one row, in its own process -------------------------------------------------------------------
def run_rows(rates: Mapping[str, Sequence[float]], output: Path, epochs: int
             ) -> Iterator[dict[str, Any]]:
    """Rows as they finish; as many at once as there are cores, two at most."""
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        waiting = [pool.submit(_spawn, recipe, list(lrs), output, epochs)
                   for recipe, lrs in rates.items()]
        try:
            for job in waiting:
                yield job.result()
        finally:
            for job in waiting:
                job.cancel()


def _spawn(recipe: str, lrs: list[float], output: Path, epochs: int) -> dict[str, Any]:
    folder = output / recipe.partition("(")[0]
    order = json.dumps({"recipe": recipe, "rates": lrs, "folder": str(folder), "epochs": epochs})
    env = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    source = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [source, env.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "burnish.fit.demo", order], env=env,
                          capture_output=True, text=True)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BurnishError(f"the demo's row {recipe} failed: {tail[0]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(recipe: str, rates: Sequence[float], folder: str, epochs: int) -> dict[str, Any]:
    """Fits `recipe` once per rate; the best on validation is the row."""
    from .data import read
    from .report import change
    from .run import fit
    from .tasks import evaluate, task_for

    best: Any = None
    tried = []
    for rate in rates:
        run = fit(str(GLYPH_VIT), "digits", recipe, output=Path(folder) / f"{rate:g}", quiet=True,
                  report=False, test=False, overwrite=True, learning_rate=rate, epochs=epochs,
                  batch_size=BATCH, seed=SEED, save_total_limit=1)
        score = (run.metrics["validation"]["accuracy"], -run.metrics["validation"]["loss"])
        tried.append({"learning_rate": rate, "accuracy": score[0]})
        if best is None or score > best[0]:
            best = (score, rate, run)
    _, rate, run = best
    memory = run.facts["memory"]
    test = evaluate(run.tuned.model, task_for(read("digits"), str(GLYPH_VIT)), "test")
    run.facts["metrics"]["test"] = test
    with staged.update(run.folder, "adapter") as new:
        safe.write_json(new / "run.json", run.facts)
        safe.write_json(new / "history.json",
                        {"history": run.history, "layers": change(run.tuned), "tried": tried})
    return {"recipe": recipe, "accuracy": test["accuracy"],
            "validation": run.metrics["validation"]["accuracy"], "trained": run.facts["trainable"],
            "simulated": run.promise.peak_bytes, "measured": run.truth.peak_bytes,
            "difference": memory["difference"],
            "grew": max(0, memory["process_peak"] - memory["process_before"]),
            "learning_rate": rate, "tried": list(rates), "seconds": run.facts["time"]["seconds"],
            "folder": str(run.folder), "chosen": recipe == CHOSEN}


if __name__ == "__main__":
    print(json.dumps(row(**json.loads(sys.argv[1]))))
