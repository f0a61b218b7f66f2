"""``burnish advise``: a recipe, a rate and a batch for a model and data, with why and the command.

Nothing is asked that can be read off: the task, its classes and lengths follow from the rows, the
device and the memory from the machine, the costs from the simulator. No weights are read unless a
test of rates is asked for.
"""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.batches import moved
from ..core.errors import BurnishError, ConfigError, NoPlanError
from ..core.reading import plain
from ..core.recipe import parse
from ..engine.tune import tune
from ..formats.model_files import loading
from ..memory import format_bytes, parse_bytes, plan
from ..memory.search import Progress
from ..memory.table import duration
from ..memory.usual import CHUNKED
from .arguments import OWN_ALIASES, sort_out
from .autos import auto_of
from .data import read, there
from .kinds import generated
from .pipelines import usual_task
from .places import check_local, check_served, suited
from .promise import as_trained, device, stores
from .settings import learning_rate, usual_rate
from .tasks import Task, by_itself, task_for

#: rates that are tried, as shares of the one that fit takes by itself
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
#: the share that stands for no rate at all
STILL = 1e-6
#: updates per rate; steps per size of batch (one to warm up)
UPDATES, TIMED = 12, 3
#: a rate that brings this share of the largest fall of the loss is as good; the smallest is taken
ALIKE = 0.9
#: settings that say how rows are read; the others are of the run
READ = ("task", "text", "label", "image", "audio", "prompt", "completion", "split", "validation",
        "max_length", "loss_type", "beta", "gamma", "pooling", "scale", "dimension", "shots",
        "group", "seed",
        "instance_prompt", "proportion_empty_prompts", "resolution", "guidance_scale",
        "num_inference_steps", "snr_gamma")
#: updates that a run should have at least, and the batch and epochs it is given for that
LEAST, BATCHES, EPOCHS = 60, (16, 8, 4), (3, 6, 10)
#: share of what is free on a host that a run may take, and what the process itself does
SHARE, PROCESS = 0.8, 400 * 2**20


@dataclass(frozen=True)
class Test:
    """What a short test has found. still: the mean loss of the last third of the rows where nothing
    is learnt; losses: rate -> the same where it is, None where it came apart. speeds: batch -> rows
    a second. best, batch: what is taken of them."""

    still: float
    losses: dict[float, float | None]
    speeds: dict[int, float]
    best: float
    batch: int
    updates: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"still": self.still, "losses": {f"{r:g}": v for r, v in self.losses.items()},
                "rows_per_second": {str(b): v for b, v in self.speeds.items()},
                "rate": self.best, "batch": self.batch, "updates": self.updates,
                "seconds": self.seconds}


@dataclass
class Advice:
    """recipe, batch (accumulated so many times), rate, epochs; `lines` say why, `command` does it.
    facts: what was read off."""

    recipe: str
    batch: int
    accumulate: int
    rate: float
    epochs: int
    lines: list[str]
    command: str
    facts: dict[str, Any] = field(default_factory=dict)
    test: Test | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "batch": self.batch, "accumulate": self.accumulate,
                "learning_rate": self.rate, "epochs": self.epochs, "why": self.lines,
                "command": self.command, "facts": self.facts, "notes": self.notes,
                "test": self.test.to_dict() if self.test else None}


def advise(model: str, data: Any, memory: str | int | None = None, *, test: bool = False,
           say: Callable[[str], None] = lambda text: None, progress: Progress | None = None,
           **reading: Any) -> Advice:
    """What to run for `model` on `data`, within `memory` (default: what this machine has free).

    test: train a few updates at each of :data:`RATES` and time a few sizes of batch, on the real
        rows and weights; `say` is told beforehand what that costs.  reading: how `fit` reads the
        data (task, text, label, image, prompt, completion, split, max_length, seed).

    Raises ConfigError and DataError as `fit` does, NoPlanError where nothing fits.
    """
    own, args, _ = sort_out(reading)
    if odd := [k for k in reading if OWN_ALIASES.get(k, k) not in READ]:
        raise ConfigError(f"{odd[0]} is a setting of the run, which is what is advised; give it to "
                          f"fit. Here stand {', '.join(READ)}")
    seed = int(args.get("seed", 42))
    check_local(model)
    there(data)
    budget, whose = (parse_bytes(memory), "as you said") if memory is not None else at_hand()
    found = suited(read(data, task=own.task or usual_task(model), text=own.text,
                        label=own.label, image=own.image, audio=own.audio,
                        prompt=own.prompt, completion=own.completion,
                        split=own.split, validation=own.validation, group=own.group,
                        seed=seed), model)
    by_itself(found.task, None, budget)
    check_served(found.task, model)
    task = task_for(found, model, max_length=own.max_length, seed=seed, **own.of_task())
    say(str(found))
    module = blank(task, model)
    rows = len(task.rows("train"))
    size, epochs = amount(rows)
    facts = {"task": found.task, "rows": rows, "classes": len(found.labels or ()),
             "device": device(), "memory": budget, **lengths(task)}
    example = task.example(min(size, rows))
    batch, loss = task.call(example, plain=False)
    with as_trained(module.train(), {}):
        plans = plan(module, memory=budget, batch=batch, device=device(), loss=loss, rows=rows,
                     epochs=epochs, cache=False, progress=progress,
                     workers=1 if torch.cuda.is_initialized() else None)
    best = plans.best
    if best is None:
        near = plans.cheapest
        raise NoPlanError(f"no recipe fits {format_bytes(budget)}" + (
            f"; {near.recipe} comes closest and needs {format_bytes(near.needs)}" if near else ""))
    recipe = best.recipe.removesuffix(f" + {CHUNKED}")
    done = tried(task, model, recipe, best.batch, size, say, seed) if test else None
    total = sum(p.numel() for p in module.parameters()) + best.trainable
    rate = done.best if done else usual_rate(best.trainable, total, parse(recipe))
    at_once = min(done.batch, best.batch) if done else best.batch
    accumulate = -(-min(size, rows) // at_once)
    lines = [_why_recipe(recipe, plans, best, budget, whose),
             _why_batch(at_once, accumulate, epochs, rows, facts, best),
             _why_rate(rate, done)]
    extra = {k: v for k, v in reading.items() if v is not None}
    command = _command(model, data, recipe, at_once, accumulate, rate, epochs, extra, memory)
    return Advice(recipe, at_once, accumulate, rate, epochs, lines, command, facts, done,
                  list(dict.fromkeys(task.notes)))


# -- read off -----------------------------------------------------------------------------------
def at_hand() -> tuple[int, str]:
    """(bytes that a run may take on this machine's device, whose they are in words)."""
    if device() == "cuda":
        return torch.cuda.mem_get_info()[0], f"free on {torch.cuda.get_device_name()}"
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        text = meminfo.read_text()
        found += [int(line.split()[1]) * 1024 for line in text.splitlines()
                  if line.startswith("MemAvailable:")]
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{n}" for n in ("max", "current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        found.append(int(most) - int(used.read_text()))
    if not found or (free := int(SHARE * min(found)) - PROCESS) <= 0:
        raise ConfigError("how much memory there is cannot be read off here; give memory=")
    return free, f"{100 * SHARE:.0f} % of what is free here, less the process itself"


def blank(task: Task, name: str, trust: bool = False, dtype: torch.dtype | None = None
          ) -> nn.Module:
    """The model that `task` trains, by its configuration alone: no weights are read. dtype: of
    those that would be; None: what the configuration says."""
    import transformers

    if generated(task.data.task):
        made = task.blank(name)
        return made if dtype is None else made.to(dtype)
    auto = auto_of(task.data.task)
    head = {k: v for k, v in task.head().items() if k != "ignore_mismatched_sizes"}
    with loading(name, f"the model for {task.data.task},", code=trust) as where:
        try:
            config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust, **head)
            with torch.device("meta"):
                module = auto.from_config(config, trust_remote_code=trust,
                                          **({} if dtype is None else {"dtype": dtype}))
        except (OSError, ValueError) as e:
            raise ConfigError(f"{name} cannot be made for {task.data.task}: "
                              f"{plain(str(e).strip().partition(chr(10))[0])}") from None
    task.settle(module)
    return module


def amount(rows: int) -> tuple[int, int]:
    """(batch, epochs) with which so many rows make enough updates: fewer rows, smaller batches and
    more epochs; from some tens of thousands on one epoch."""
    if rows > 50_000:
        return BATCHES[0], 1
    return next(((b, e) for e in EPOCHS for b in BATCHES if e * rows >= b * LEAST),
                (BATCHES[-1], EPOCHS[-1]))


def lengths(task: Task) -> dict[str, int]:
    """Tokens of the longest training row and of the middle one; nothing for pictures."""
    rows = task.rows("train")
    if "input_ids" not in rows[0]:
        return {}
    every = [rows.length(i) for i in range(0, len(rows), max(1, len(rows) // 2000))]
    return {"longest": int(torch.as_tensor(task.example(1)["input_ids"]).shape[-1]),
            "middle": int(statistics.median(every))}


# -- the test -----------------------------------------------------------------------------------
def tried(task: Task, name: str, recipe: str, most: int, size: int, say: Callable[[str], None],
          seed: int) -> Test:
    """Short trainings of the real model on its rows, from the same start with the same rows each.

    most: rows at once that fit the memory.  size: rows of an update.
    """
    began = time.perf_counter()
    torch.manual_seed(seed)                          # a new head is drawn, as fit draws it
    module = task.load(name, unread=stores(recipe))
    task.check(module)
    where = device()
    rows, batches = task.rows("train"), []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    at_once = min(most, len(rows))
    for k in range(UPDATES):
        picked = [rows[order[(k * at_once + i) % len(order)]] for i in range(at_once)]
        batches.append(task.call(moved(task.collate(picked), where), plain=False))
    sizes = sorted({min(b, most, len(rows)) for b in (1, 2, 4, 8, 16) if b <= size} | {at_once})
    count = (1 + len(RATES)) * UPDATES + len(sizes) * TIMED

    def ready() -> Any:
        torch.manual_seed(seed)
        tuned = tune(module.to(where), recipe, seed=seed)
        task.ready(tuned, where, at_once)
        tuned.model.train()
        return tuned

    tuned = ready()
    usual = learning_rate(tuned)
    tuned.optimizer(lr=usual)
    speeds: dict[int, float] = {}
    for n, b in enumerate(sizes):
        batch, loss = task.call(moved(task.example(b), where), plain=False)
        times = [_timed(tuned, batch, loss) for _ in range(TIMED)]
        speeds[b] = b / min(times[1:])
        if n == 0:                                   # were all as slow a row as the first
            hours = min(times) * at_once / b * count / 3600
            say(f"test: {len(RATES)} rates and none, {UPDATES} updates of {at_once} rows each, "
                f"and {len(sizes)} sizes of batch: {count} updates, at most about "
                f"{duration((hours, hours))}")
    tuned.detach()
    losses: dict[float, float | None] = {}
    for rate in (STILL * usual, *(float(f"{share * usual:.1g}") for share in RATES)):
        tuned = ready()
        tuned.optimizer(lr=rate)
        losses[rate] = _loss(tuned, batches)
        tuned.detach()
    still = losses.pop(STILL * usual)
    if still is None:
        raise BurnishError("the loss of the base is not finite on these rows; look at them, and at "
                           "the model's dtype")
    losses = {r: v if v is not None and v < still + abs(still) / 5 else None
              for r, v in losses.items()}
    return Test(still, losses, speeds, _best(still, losses), _smallest(speeds), count,
                time.perf_counter() - began)


def _timed(tuned: Any, batch: Any, loss: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    tuned.step(batch, loss=loss)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _loss(tuned: Any, batches: Sequence[tuple[Any, Any]]) -> float | None:
    """The mean loss of the last third; None where it is no number."""
    seen: list[float] = []
    for batch, loss in batches:
        try:
            seen.append(float(tuned.step(batch, loss=loss)))
        except BurnishError:                         # not finite: nothing was updated
            return None
    return statistics.mean(seen[-(len(seen) // 3):])


def _best(still: float, losses: Mapping[float, float | None]) -> float:
    """The smallest rate that is as good as the best: a few updates flatter large ones."""
    known = {r: v for r, v in losses.items() if v is not None}
    if not known:
        raise BurnishError(f"the loss came apart at every rate from {min(losses):g} to "
                           f"{max(losses):g}; look at the rows, and at the model's dtype")
    low = min(known.values())
    if low >= still:                                 # so few updates tell nothing
        return sorted(known)[len(known) // 2]
    return min(r for r, v in known.items() if v <= still - ALIKE * (still - low))


def _smallest(speeds: Mapping[int, float]) -> int:
    """The smallest batch within a tenth of the most rows a second."""
    return min(b for b, v in speeds.items() if v >= 0.9 * max(speeds.values()))


# -- in words -----------------------------------------------------------------------------------
def _why_recipe(recipe: str, plans: Any, best: Any, budget: int, whose: str) -> str:
    why = f"needs {format_bytes(best.needs)} of {format_bytes(budget)} ({whose})"
    full = next((p for p in [*plans.fits, *plans.over]
                 if p.recipe.partition(" +")[0] == "full"), None)
    if recipe == "full" or full is None:
        return f"recipe  {recipe}: {why}"
    than = "does not fit" if full in plans.over else "is no better on a small task"
    return f"recipe  {recipe}: {why}; full fine-tuning needs {format_bytes(full.needs)} and {than}"


def _why_batch(at_once: int, accumulate: int, epochs: int, rows: int, facts: Mapping[str, Any],
               best: Any) -> str:
    updates = math.ceil(math.ceil(rows / (at_once * accumulate)) * epochs)
    size = f"{at_once}" + (f" x {accumulate}" if accumulate > 1 else "")
    long = (f", the longest of {facts['longest']} tokens, the middle one of {facts['middle']}"
            if "longest" in facts else "")
    hours = f", {duration(best.hours)}" if best.hours else ""
    return (f"batch   {size}: {rows:,} rows{long}; {epochs} epochs are {updates:,} updates"
            f"{hours}")


def _why_rate(rate: float, done: Test | None) -> str:
    if done is None:
        return f"rate    {rate:g}: what fit takes by itself, not tried on these rows (test=True)"
    told = ", ".join(f"{r:g} {'came apart' if v is None else f'{v:.3g}'}"
                     for r, v in done.losses.items())
    told = f"from {done.still:.3g}: {told}"
    if min(v for v in done.losses.values() if v is not None) >= done.still:
        return (f"rate    {rate:g}: the middle one; none lowers the loss in {UPDATES} updates "
                f"({told})")
    top = ", and the largest tried" if rate == max(done.losses) else ""
    return (f"rate    {rate:g}: the smallest with {100 * ALIKE:.0f} % of the best fall of the loss "
            f"in {UPDATES} updates{top} ({told})")


def _command(model: str, data: Any, recipe: str, at_once: int, accumulate: int, rate: float,
             epochs: int, reading: Mapping[str, Any], memory: Any) -> str:
    words = ["burnish", "fit", "--model", model, "--data", str(data), "--recipe", recipe,
             "--batch_size", str(at_once)]
    words += ["--accumulation", str(accumulate)] if accumulate > 1 else []
    words += ["--learning_rate", f"{rate:g}", "--epochs", str(epochs)]
    words += ["--memory", str(memory)] if memory is not None else []
    for k, v in reading.items():
        words += [f"--{k}", str(v)]
    stem = Path(str(data).partition(":")[0]).stem
    words += ["--output", f"runs/{stem if stem.strip('.') else 'out'}"]
    return " ".join(map(shlex.quote, words))
