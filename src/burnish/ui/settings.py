"""What the page may set of a run: names, kinds and bounds as `fit` declares them, and for the rest
the reason why not. The server imports neither torch nor transformers for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..core.errors import ConfigError, nearest
from ..core.reading import shown
from ..fit.arguments import (
    ALIASES,
    LEAST,
    MOST,
    OF_TASK,
    OWN_ALIASES,
    Options,
    kinds_of_task,
    training_kinds,
    typed,
)

#: what a change of a field makes anew: what was read, the plan, or nothing before the run starts
Acts = Literal["reading", "plan", "run"]
#: letters of a text
LONGEST = 2000
TRUTH = ("true", "false")
#: schedules that ask for nothing more
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
             "constant_with_warmup", "inverse_sqrt")

#: group -> setting -> (what it acts on, what it is)
GROUPS: dict[str, dict[str, tuple[Acts, str]]] = {
    "Columns": {
        "task": ("reading", "what is learnt, where the columns do not say it"),
        "text": ("reading", "the column of texts"),
        "label": ("reading", "the column of labels"),
        "image": ("reading", "the column of pictures"),
        "audio": ("reading", "the column of sounds"),
        "prompt": ("reading", "the column that is asked"),
        "completion": ("reading", "the column that is answered"),
        "split": ("reading", "the training split, where it has another name"),
    },
    "Rows": {
        "max_length": ("reading", "tokens of the longest row; what is longer is cut"),
        "validation": ("reading", "share or number of rows held out where no split is; 0: none"),
        "group": ("reading", "the column that says which task an example is of, beside shots"),
        "seed": ("reading", "of all that is drawn"),
        "test": ("run", "the test split is looked at in the end"),
        "group_by_length": ("run", "rows of like length stand in one batch"),
    },
    "Training": {
        "learning_rate": ("run", "the largest of the schedule"),
        "lr_scheduler_type": ("run", "how the rate goes down"),
        "warmup_steps": ("run", "updates, or a share of them, in which the rate rises"),
        "weight_decay": ("run", "of what is trained"),
        "max_grad_norm": ("run", "gradients are cut to this length; 0: never"),
        "label_smoothing_factor": ("run", "share of a label that all classes have"),
        "max_steps": ("run", "updates at most"),
        "accumulation": ("plan", "batches of one update; a plan that cuts them has more"),
        "early_stopping_patience": ("run", "evaluations without a better figure, then it ends"),
    },
    "Model": {
        "targets": ("plan", "the layers that recipes change, such as q,v or layers.*.mlp"),
        "head": ("plan", "a new head is trained beside the recipe"),
        "dtype": ("plan", "numbers that the base is held in"),
    },
    "Looks": {
        "logging_steps": ("run", "updates between two lines, or a share of all"),
        "eval_steps": ("run", "updates between two evaluations, with a limit of updates"),
        "save_steps": ("run", "updates between two checkpoints, with a limit of updates"),
        "save_total_limit": ("run", "checkpoints that are kept"),
        "per_device_eval_batch_size": ("run", "rows at once in an evaluation"),
        "samples": ("run", "rows of validation that are answered after each evaluation"),
        "tensorboard": ("run", "files for TensorBoard as well"),
        "report": ("run", "a report in the end"),
        "measure": ("run", "a step is measured in the end, beside its promise"),
    },
}
#: what stands in the plan's own line, and is written by it
PLANNED = ("epochs", "batch_size")
CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler_type": SCHEDULES, "dtype": ("float32", "bfloat16", "float16"), "head": TRUTH}
#: options of `fit` that the page does not offer
LEFT_OUT = {
    "processor": "the model's own reads the rows",
    "resume": "a run that was stopped has a button for it",
    "init_from": "a folder outside of what was opened could be named; fit takes it",
    "overwrite": "each run has a folder of its own",
    "quiet": "the page reads what is printed",
    "shard": "a run of the page is one process; burnish fit --launch starts several",
    "shard_offload": "a run of the page is one process",
    "trust_remote_code": "who starts the server says it, with --trust-remote-code",
    "callbacks": "they are code",
    "output": "each run has a folder of its own",
}


@dataclass(frozen=True)
class Field:
    """One setting as the page shows it; kind: str, int, float, bool or choice."""

    name: str
    group: str
    acts: Acts
    help: str
    kind: str
    least: float | None
    most: float | None
    choices: tuple[str, ...]


@functools.cache
def offered() -> tuple[Field, ...]:
    """Every field that is of no task of its own, in the order of the page."""
    return tuple(_field(name, group, *what) for group, found in GROUPS.items()
                 for name, what in found.items())


def _field(name: str, group: str, acts: Acts, text: str) -> Field:
    hint, canonical = declared(name)
    choices = CHOICES.get(name, TRUTH if "bool" in hint else ())
    kind = "choice" if name in CHOICES else next(
        (k for k in ("bool", "float", "int") if k in hint), "str")
    return Field(name, group, acts, text, kind, LEAST.get(canonical), MOST.get(canonical), choices)


def declared(name: str) -> tuple[str, str]:
    """(its annotation, its name where it is declared)."""
    canonical = OWN_ALIASES.get(name, ALIASES.get(name, name))
    own = {f.name: str(f.type) for f in fields(Options)}
    return {**training_kinds(), **own}[canonical], canonical


@functools.cache
def known() -> tuple[str, ...]:
    """Every setting that a run of the page may have."""
    return (*PLANNED, *(f.name for f in offered()), *OF_TASK)


def told(given: Any) -> dict[str, Any]:
    """Settings as they were given, each in the kind that `fit` declares; null is none.

    Raises ConfigError, which begins with the setting's name.
    """
    if not isinstance(given, Mapping):
        raise ConfigError("settings: expected an object")
    for name in given:
        if name not in known():
            why = LEFT_OUT.get(name)
            raise ConfigError(f"{name!r} is not set here" + (
                f": {why}" if why else nearest(str(name), known())
                or f"; there are {', '.join(known())}"))
    return {k: _one(k, v) for k, v in given.items() if v is not None}


def _one(name: str, value: Any) -> Any:
    if not isinstance(value, str | int | float) or len(str(value)) > LONGEST:
        raise ConfigError(f"{name}: expected a short text, a number, true or false")
    choices = CHOICES.get(name)
    if choices and str(value).lower() not in choices:
        raise ConfigError(f"{name}={shown(value, 60)}: expected one of {', '.join(choices)}"
                          f"{nearest(str(value), choices)}")
    if choices == TRUTH:
        return str(value).lower() == "true"
    if name in OF_TASK:
        return typed(name, value, kinds_of_task()[name], name)
    hint, canonical = declared(name)
    if "Any" in hint and not isinstance(value, str):
        raise ConfigError(f"{name}={shown(value, 60)}: expected text")
    return typed(name, value, hint, canonical)


def as_shown() -> list[dict[str, Any]]:
    """The fields for the page."""
    return [asdict(f) for f in offered()]
