"""The process beside the server: it holds torch, reads data, plans, and answers for a finished run.

One question at a time, as a line of JSON on its input, and lines on its output:

    {"id": 3, "ask": "plan", "with": {...}}
    {"id": 3, "progress": [4, 20]}
    {"id": 3, "answer": {...}}      or   {"id": 3, "error": "...", "kind": "DataError", ...}

    python -m burnish.ui.desk

It is told paths that have been looked at (places.py) and which folders tables may point into.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import BurnishError, ConfigError
from .answers import predict
from .places import confine

Say = Callable[[int, int], None]

#: rows that are shown of data, and classes that are counted one by one
SHOWN, CLASSES = 6, 200


# -- the machine ---------------------------------------------------------------------------------
def machine(say: Say) -> dict[str, Any]:
    """Where training would run, and what it has."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return {"device": "cuda", "name": torch.cuda.get_device_name(), "memory": total,
                "free": free}
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        memory = free = 0
    return {"device": "cpu", "name": f"{os.cpu_count() or 1} CPU cores", "memory": memory,
            "free": free}


# -- the model -----------------------------------------------------------------------------------
def model(say: Say, model: str, trust: bool = False) -> dict[str, Any]:
    """What a model is, and what it can be trained for, from its configuration."""
    import torch

    from ..core.architecture import architecture
    from ..fit.kinds import KINDS
    from ..fit.pipelines import is_pipeline
    from ..fit.places import check_local, check_served, config_of

    quiet()
    check_local(model)
    if is_pipeline(model):
        return pipeline(model)
    config = config_of(model, "fine-tuning", trust)
    tasks = []
    for task in KINDS:
        try:
            check_served(task, model, trust)
            tasks.append(task)
        except ConfigError:
            continue
    try:
        made = architecture(config)
        with torch.device("meta"):
            count = sum(p.numel() for p in made._from_config(config).parameters())
        name = made.__name__
    except (BurnishError, AttributeError):      # trained in several ways: the data will say
        count, name = None, None
    positions = getattr(config, "max_position_embeddings", None)
    return {"type": config.model_type, "architecture": name, "parameters": count,
            "positions": positions if isinstance(positions, int) else None, "tasks": tasks,
            "dtype": str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")}


def pipeline(folder: str) -> dict[str, Any]:
    """The same of a pipeline of diffusers, of which the denoiser trains."""
    import torch

    from ..fit.pipelines import Pipeline, tasks_of

    found = Pipeline(folder)
    with torch.device("meta"):
        made = found.blank(found.part)
    return {"type": found.kind, "architecture": f"{type(made).__name__} of a {found.kind}",
            "parameters": sum(p.numel() for p in made.parameters()), "positions": None,
            "tasks": list(tasks_of(folder)), "dtype": "float32"}


# -- the data ------------------------------------------------------------------------------------
def data(say: Say, data: str, tops: list[str], model: str | None = None, trust: bool = False,
         how: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None
         ) -> dict[str, Any]:
    """What was understood of data, as `fit` will read it; how long rows are needs the model.

    settings: what `fit` is told. What this task may be told is in the answer, and so is why it
    refuses the rows as they are (``refused``): it may be for want of a setting.
    """
    from ..fit.report import gallery

    quiet()
    found = rows(data, tops, model, trust, Asked.of(how, settings))
    told = {"task": found.task, "layout": found.layout, "columns": found.columns,
            "rows": {k: len(v) for k, v in found.splits.items()},
            "labels": list(found.labels) if found.labels else None,
            "classes": counted(found), "samples": samples(found),
            "pictures": [{"image": uri, "label": label} for uri, label in gallery(found)]}
    told |= {"settings": asked_of(found.task), "idle": idle_of(found.task)}
    if model is not None:
        try:
            told |= lengths(taught(data, tops, model, trust, Asked.of(how, settings))[0])
        except ConfigError as e:
            told["refused"] = line(e)
            if not told["settings"]:
                raise
    return told


def asked_of(task: str) -> list[dict[str, Any]]:
    """What `fit` lets a task be told: its name, its kind and the bounds of a number."""
    from ..fit.arguments import LEAST, MOST, kinds_of_task
    from ..fit.tasks import TASKS

    return [{"name": n, "kind": kind, "least": LEAST.get(n), "most": MOST.get(n)}
            for n, kind in kinds_of_task().items() if n in TASKS[task].settings]


def idle_of(task: str) -> list[str]:
    """Settings of every task that this one refuses or never reads."""
    from ..fit.tasks import TASKS

    kind = TASKS[task]
    acts = {"group": "shots" in kind.settings, "group_by_length": kind.unlike,
            "label_smoothing_factor": kind.smooths}
    return [name for name, does in acts.items() if not does]


@dataclass(frozen=True)
class Asked:
    """What `fit` is told: its own options, and those of transformers."""

    own: Any
    args: dict[str, Any]

    @classmethod
    def of(cls, how: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> Asked:
        from ..fit.arguments import sort_out

        own, args, _ = sort_out({**(settings or {}), **(how or {})})
        return cls(own, args)

    @property
    def seed(self) -> int:
        return int(self.args.get("seed", 42))

    @property
    def columns(self) -> dict[str, str]:
        return {k: v for k in ("text", "label", "image", "audio", "prompt", "completion", "split")
                if (v := getattr(self.own, k)) is not None}


def rows(data: str, tops: list[str], model: str | None, trust: bool, asked: Asked) -> Any:
    """The data as `fit` reads them, for this model."""
    from ..fit.data import read
    from ..fit.pipelines import usual_task
    from ..fit.places import suited

    own = asked.own
    confine(data, tops, [*asked.columns.values(), *filter(None, (own.task, own.group))])
    found = read(data, task=own.task or usual_task(model), validation=own.validation,
                 group=own.group, seed=asked.seed, **asked.columns)
    return found if model is None else suited(found, model, trust)


def taught(data: str, tops: list[str], model: str, trust: bool, asked: Asked,
           first: int | None = None) -> tuple[Any, Any]:
    """The task that `fit` would make of data and model, and the model without its weights.

    first: so many rows of a pipeline's data: each takes as much as any other, and is encoded before
        it can be planned.
    """
    from ..core.dtypes import dtype_of
    from ..fit.advice import blank
    from ..fit.kinds import generated
    from ..fit.places import check_served
    from ..fit.tasks import TASKS, task_for

    found = rows(data, tops, model, trust, asked)
    check_served(found.task, model, trust)
    if first is not None and generated(found.task):
        some = found.train.select(range(min(first, len(found.train))))
        found = replace(found, splits={"train": some})
    own = {k: v for k, v in asked.own.of_task().items() if k in TASKS[found.task].settings}
    task = task_for(found, model, max_length=asked.own.max_length, trust_remote_code=trust,
                    seed=asked.seed, **own)
    return task, blank(task, model, trust, dtype_of(asked.own.dtype))


def check(say: Say, data: str, tops: list[str], model: str, trust: bool = False,
          how: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None,
          recipe: str | None = None) -> dict[str, Any]:
    """Whether a run may begin with these settings: what `fit` refuses before it loads a model is an
    error here."""
    from ..core.recipe import parse
    from ..fit.settings import check_values

    quiet()
    asked = Asked.of(how, settings)
    if recipe is not None:
        parse(recipe)
    found = rows(data, tops, model, trust, asked)
    asked.args.setdefault("per_device_train_batch_size", 16)
    check_values({"": found}, Path(tempfile.gettempdir()), asked.own, asked.args, recipe, model)
    return {}


def counted(found: Any) -> dict[str, int] | None:
    """Rows per class of the training split."""
    if not found.task.endswith("classification") or "label" not in found.train.column_names:
        return None
    labels = found.train["label"][:]
    return {name: labels.count(i) for i, name in enumerate(found.labels[:CLASSES])}


def samples(found: Any) -> list[dict[str, str]]:
    """A few training rows, spread over the split, in words."""
    step = max(1, len(found.train) // SHOWN)
    return [{k: words(k, v, found.labels) for k, v in found.train[i].items()}
            for i in range(0, len(found.train), step)][:SHOWN]


def words(name: str, value: Any, labels: Sequence[str] | None, most: int = 400) -> str:
    if name in ("label", "tags") and labels:
        many = value if isinstance(value, list) else [value]
        text = ", ".join(labels[v] for v in many if isinstance(v, int))
    elif hasattr(value, "size") and hasattr(value, "mode"):
        text = f"{value.size[0]} x {value.size[1]} {value.mode}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        text = "\n".join(f"{m.get('role', '')}: {m.get('content', m)}" for m in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= most else f"{text[:most - 1]}…"


def lengths(task: Any) -> dict[str, Any]:
    """How many tokens rows have, and what the tokenizer said of them. `longest` is what a step must
    be planned for; None where rows are no texts."""
    from ..fit.kinds import generated

    told: dict[str, Any] = {"alone": task.alone, "longest": None}
    if generated(task.data.task):               # pictures are encoded where it is planned
        return told | {"train": len(task.data.train), "notes": list(task.notes)}
    rows = task.rows("train")
    batch = task.example(1)
    if "input_ids" in batch:
        many = sorted(rows.length(i) for i in range(len(rows)))
        told |= {"longest": int(batch["input_ids"].shape[-1]),
                 "tokens": {"median": many[len(many) // 2], "most": many[-1],
                            "nine_in_ten": many[(9 * len(many)) // 10 - (len(many) % 10 == 0)]}}
    return told | {"train": len(rows), "notes": list(task.notes)}


# -- the plan ------------------------------------------------------------------------------------
def plan(say: Say, model: str, memory: str | int, batch: int, length: int | None = None,
         task: str | None = None, labels: Sequence[str] | None = None, prefer: str | None = None,
         device: str | None = None, rows: int | None = None, epochs: float | None = None,
         candidates: list[str] | None = None, trust: bool = False, data: str | None = None,
         tops: Sequence[str] = (), how: Mapping[str, Any] | None = None,
         settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every recipe with what it costs, as `fit` would train it on the costliest rows of `data`;
    without data, from the configuration and the shape of a batch."""
    import burnish

    from ..core.dtypes import dtype_of
    from ..core.recipe import parse
    from ..fit.places import config_of
    from ..fit.promise import as_trained
    from ..fit.tasks import by_itself
    from ..memory.fakes import from_config
    from ..memory.usual import usual

    quiet()
    if task is not None:
        by_itself(task, None, memory)
    asked = Asked.of(how, settings)
    shape: Any = batch if length is None else (batch, length)
    loss: Any = None
    if data is not None:
        of, of_what = taught(data, list(tops), model, trust, asked, batch)
        shape, loss = of.call(of.example(batch), False)
        of_what.train()
    else:
        of_what = config_of(model, task or "fine-tuning", trust)
        if task is not None:
            as_task(of_what, task, labels)

    def planned(recipes: list[str] | None) -> Any:
        with as_trained(of_what, {}):
            return burnish.plan(
                of_what, memory=memory, batch=shape, prefer=prefer, device=device, loss=loss,
                candidates=recipes, rows=rows, epochs=epochs if rows else None, progress=say,
                targets=asked.own.targets, head=asked.own.head,
                accumulation=int(asked.args.get("gradient_accumulation_steps", 1)),
                **({} if data is not None else {"dtype": dtype_of(asked.own.dtype)}))

    if candidates is None:
        plans = planned(None)
    else:                                       # what is written is completed as `fit` does it
        made = usual(from_config(of_what) if data is None else of_what)
        completed = [str(made(c)) for c in candidates]
        try:
            plans = planned(completed)
        except ConfigError:
            if completed == [str(parse(c)) for c in candidates]:
                raise
            plans = planned(candidates)
    return {"budget": plans.budget, "batch": plans.batch, "shape": plans.shape,
            "prefer": plans.prefer, "device": plans.device, "notes": plans.notes,
            "refused": plans.refused, "updates": plans.updates,
            "rates": plans.rates.source if plans.rates else None,
            "best": plans.best.recipe if plans.best else None,
            "missing": plans.missing_bytes,
            "recipes": [point(p, fits) for fits, many in ((True, plans.fits), (False, plans.over))
                        for p in many]}


def point(p: Any, fits: bool) -> dict[str, Any]:
    """One recipe, as the page draws it."""
    return {"recipe": p.recipe, "fits": fits, "batch": p.batch, "accumulate": p.accumulate,
            "needs": p.needs, "peak": p.peak_bytes, "by": p.report.by_category,
            "quality": p.quality, "known": not p.source.startswith("no measured"),
            "source": p.source, "time": p.time, "seconds": p.seconds, "hours": p.hours,
            "trainable": p.trainable, "adapter": p.adapter_bytes, "notes": p.notes}


def as_task(config: Any, task: str, labels: Sequence[str] | None) -> None:
    """The configuration as `fit` loads it: the task's class, with a head of as many classes."""
    from ..fit.autos import auto_of

    known = auto_of(task)._model_mapping
    if type(config) in known:
        found = known[type(config)]
        config.architectures = [(found[0] if isinstance(found, tuple | list) else found).__name__]
    if labels:
        config.num_labels = len(labels)
    elif task.endswith("regression"):
        config.num_labels = 1


# -- one question after another ------------------------------------------------------------------
ASKED: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": machine, "model": model, "data": data, "plan": plan, "check": check,
    "predict": predict}


def quiet() -> None:
    from ..fit.driving import quiet_libraries

    quiet_libraries()


def answer(ask: str, how: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """{"answer": ...}, or {"error": one line, "kind": its class} with readings where the columns
    leave a choice."""
    from ..fit.readings import AmbiguousError

    try:
        return {"answer": ASKED[ask](say, **how)}
    except AmbiguousError as e:
        return {"error": line(e), "kind": "AmbiguousError", "readings": [
            {"flags": dict(r.flags), "learns": r.learns} for r in e.readings]}
    except BurnishError as e:
        return {"error": line(e), "kind": type(e).__name__}
    except Exception as e:                      # whatever a library raises is told, not died of
        return {"error": f"{type(e).__name__}: {line(e)}", "kind": "Exception"}


def line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    # what libraries print is not an answer: it goes where errors go
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def write(message: dict[str, Any]) -> None:
        out.write(json.dumps(message, default=str) + "\n")
        out.flush()

    for text in sys.stdin:
        asked = json.loads(text)
        number = asked["id"]
        write({"id": number} | answer(
            asked["ask"], asked["with"],
            lambda done, total, n=number: write({"id": n, "progress": [done, total]})))


if __name__ == "__main__":
    main()
