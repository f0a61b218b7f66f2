"""``burnish audit --attack``: pictures made from the base alone, and what a run makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from .screen import emit, table

#: way -> what its row says
SAID = {"clean": "as they are", "random": "random signs", "encoder": "made from the base alone",
        "whole": "made from the tuned model"}


def attack(source: Path, data: str, budget: float, *, steps: int, split: str | None,
           base: str | None, batch: int, seed: int, json: bool) -> None:
    from ..fit import attacks
    from ..fit.finished import Finished
    from ..formats.combine import kind_of

    if kind_of([source]) != "adapter":
        raise ConfigError(f"{source} is a whole model, which says no base that others have: give "
                          "the folder of a fit")
    run = Finished.open(source, base)
    attacks.scale(run.task)                              # refused before any row is read
    _, name, where = run.chosen(data, split, {})
    run.task.ready(run.tuned, next(run.tuned.model.parameters()).device, batch)
    found = attacks.audit(run.tuned, run.task, name, budget=budget, steps=steps, seed=seed,
                          batch=batch)
    told = {"source": source, "data": data, "split": name, "rows": len(run.task.data.splits[name]),
            "budget": budget, "steps": steps, "seed": seed, "metric": run.task.metric,
            "figures": found}
    emit(json, told, _text(told))


def _text(told: Mapping[str, Any]) -> str:
    metric, found = told["metric"], told["figures"]
    rows = [(SAID[way], f"{f[metric]:.4f}", f"{f[metric] - found['clean'][metric]:+.4f}")
            for way, f in found.items()]
    return (f"{metric} on {told['rows']} rows of {told['data']} ({told['split']}), pixels moved by "
            f"{told['budget']:g} at most\n" + table(["pictures", metric, "change"], rows, (1, 2)))
