"""Which recipes fit the memory there is, best first.

Every candidate is simulated (the real step, on fake tensors), so a plan is a list of promises.
A head is a way of training; its variants hold the frozen weights or the tape differently. Where a
variant fits with the whole batch, slower variants of the same head are not looked at: they train
the same thing. Where it does not, the batch is halved (gradients are accumulated, so the effective
batch stays) until it does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from ..core.batches import cut, tensors
from ..core.dtypes import dtype_of
from ..core.errors import BurnishError, ConfigError, nearest
from ..core.recipe import parse
from .answers import answered, goal_of, place, training_of
from .cache import Reports
from .concessions import Step
from .limits import Limit
from .quality import Quality, kind_of, quality_of
from .rates import Rates, rates
from .report import MemoryReport
from .search import OVERHEAD, SLACK, Family, Found, Progress, Search
from .units import format_bytes
from .updates import check_accumulation
from .usual import usual
from .world import World

#: qualities that differ by less than this share of their range count as equal: the faster is first
TIE = 0.05
PREFERENCES = ("quality", "speed", "memory", "size")


@dataclass
class Plan:
    """One recipe with its promise.

    recipe: the expression to pass on. batch: samples at once; accumulate: such batches per update.
    needs: bytes of the budget it takes (the peak, and the device's own share).
    quality: the score its head may be expected to reach on tasks of the model's kind, in [0, 1],
        and its standard deviation; source: where that comes from.
    time: of one update, relative to full fine-tuning of the whole batch (1.0).
    seconds: (least, most) of one update, by the rates of the plans; hours: of the whole training,
        where its rows were named. card: the smallest that holds it, on accelerators.
    """

    recipe: str
    report: MemoryReport = field(repr=False)
    batch: int
    accumulate: int
    needs: int
    quality: float
    source: str
    time: float
    spread: float = 0.0
    notes: list[str] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)
    hours: tuple[float, float] | None = None
    card: str | None = None

    @property
    def trainable(self) -> int:
        return self.report.trainable

    @property
    def adapter_bytes(self) -> int:
        return self.report.adapter_bytes

    @property
    def peak_bytes(self) -> int:
        return self.report.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        report = self.report.to_dict()
        report.pop("timeline")                # one curve per recipe is not what a plan is for
        return {"recipe": self.recipe, "batch": self.batch, "accumulate": self.accumulate,
                "needs": self.needs, "peak_bytes": self.peak_bytes, "quality": self.quality,
                "spread": self.spread, "source": self.source, "time": self.time,
                "seconds": self.seconds, "hours": self.hours, "card": self.card,
                "trainable": self.trainable, "adapter_bytes": self.adapter_bytes,
                "notes": self.notes, "report": report}


@dataclass
class Plans:
    """Ranked plans for a budget.

    fits: what fits, best first. over: what does not, least memory first.
    refused: recipe -> why it could not be simulated on this model.
    looked: how many recipes were looked at. shape: the batch, in words.
    gpu: the card that was named. rates: what seconds and hours are made of, and where from.
    rows, epochs, updates: of the training that was named.
    limits: "largest batch ..." and "longest sequence ..." of the best plan, where asked for.
    concessions: what to give up first, to fit `goal` (a smaller card), or the budget where nothing
        fits it; held: does the best plan fit `goal` as it is?
    """

    budget: int
    batch: int
    prefer: str
    device: str
    fits: list[Plan] = field(repr=False)
    over: list[Plan] = field(repr=False)
    refused: dict[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)
    looked: int = 0
    shape: str = ""
    gpu: str | None = None
    rates: Rates | None = field(default=None, repr=False)
    rows: int | None = None
    epochs: float = 1.0
    updates: int | None = None
    limits: dict[str, Limit] = field(default_factory=dict, repr=False)
    goal: str = ""
    held: bool = False
    concessions: list[Step] = field(default_factory=list, repr=False)

    @property
    def best(self) -> Plan | None:
        """The first that fits; None when nothing does."""
        return self.fits[0] if self.fits else None

    @property
    def cheapest(self) -> Plan | None:
        """The plan that needs the least memory, whether it fits or not."""
        return min([*self.fits, *self.over], key=lambda p: p.needs, default=None)

    @property
    def missing_bytes(self) -> int:
        """How much more the cheapest plan needs than there is; 0 when something fits."""
        cheapest = self.cheapest
        return 0 if self.fits or cheapest is None else cheapest.needs - self.budget

    @property
    def kept_back(self) -> str:
        """What of the budget no tensor may take, in words; "" where a device keeps nothing."""
        fixed, share = OVERHEAD.get(self.device, 0), SLACK.get(self.device, 0.0)
        if not fixed and not share:
            return ""
        return (f"of {format_bytes(self.budget)} a peak may take what is left after "
                f"{format_bytes(fixed)} for the device's context and {100 * share:g} % of the peak "
                "for fragmentation")

    def __iter__(self):
        return iter(self.fits)

    def __len__(self) -> int:
        return len(self.fits)

    def to_dict(self) -> dict[str, Any]:
        return {"budget": self.budget, "batch": self.batch, "prefer": self.prefer,
                "device": self.device, "fits": [p.to_dict() for p in self.fits],
                "over": [p.to_dict() for p in self.over], "refused": self.refused,
                "looked": self.looked, "shape": self.shape, "gpu": self.gpu,
                "rates": None if self.rates is None else self.rates.to_dict(),
                "rows": self.rows, "epochs": self.epochs, "updates": self.updates,
                "limits": {k: v.to_dict() for k, v in self.limits.items()}, "goal": self.goal,
                "held": self.held,
                "concessions": [s.to_dict() for s in self.concessions],
                "missing_bytes": self.missing_bytes, "notes": self.notes}

    def json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def text(self, rows: int = 12) -> str:
        """A plain table of what fits, or of what comes closest and what is missing."""
        from .table import text

        return text(self, rows)

    def __str__(self) -> str:
        return self.text()


def plan(model: Any, memory: str | int | None = None, batch: Any = 8, prefer: str | None = None,
         candidates: Iterable[str] | None = None, *, gpu: str | None = None,
         rows: int | None = None, tokens: int | None = None, epochs: float | None = None,
         limits: bool = False, smaller: bool | str = False, dtype: Any = None, targets: Any = None,
         head: bool | str = "auto", device: str | None = None, loss: Any = None, tasks: int = 0,
         world_size: int = 1, shard: str | None = None, shard_offload: bool = False,
         accumulation: int = 1, cache: bool = True, workers: int | None = None,
         progress: Progress | None = None) -> Plans:
    """Recipes that train `model` within `memory`, ranked.

    model: a module or a transformers config, as for :func:`burnish.simulate`.
    memory: the budget, as text (:func:`parse_bytes`) or bytes. On CPU it is for the step's tensors
        (the process itself takes about 0.4 GB more); on an accelerator the device's context and a
        share for fragmentation are taken off (search.py: OVERHEAD, SLACK). None: what `gpu` shows,
        else 8GB.
    gpu: a card by name (gpus.py), for budget, device and rates; with `memory` a share of it.
    rows, tokens, epochs: samples or tokens of the data, and how often they are seen (once): how
        many hours each recipe takes, from counted operations and bytes (rates.py). Tokens need a
        batch (samples, tokens); every sample is taken to be as long as the batch's.
    limits: also look for the largest batch and the longest sequence of the best plan.
    smaller: also say what to give up first for the next smaller card, or for the one named here.
        Where nothing fits that is said in any case, for the budget.
    batch: samples, (samples, tokens) or a batch of tensors: the effective batch of an update. It
        may be halved and accumulated to fit. accumulation: so many of them in an update.
    prefer: "quality" (default; of recipes that are nearly as good the faster is first), then
        "speed", "memory" or "size" (of the adapter file).
    candidates: expressions to consider instead of the shipped list; each is one plan, with no
        variants added; `lean` beside its twin is one row.
    cache: keep the reports on disk (cache.py) and use those that are there. Only for a config.
    workers: processes; None: as many as pay, 1: this one alone.
    progress: called with (candidates done, of how many).
    tasks: as for :func:`burnish.simulate`; a recipe in stages needs what its dearest stage does.
    world_size, shard, shard_offload: as for :func:`burnish.simulate`; memory and batch are then
        those of one process, and what cannot be sharded is among the refused.

    Nothing fitting is no error: ``fits`` is empty, ``cheapest`` and ``missing_bytes`` say how far
    it is. Raises ConfigError for a budget, batch, card, data or preference that makes no sense.
    """
    card, budget, device = place(memory, gpu, device)
    prefer = prefer or "quality"
    if prefer not in PREFERENCES:
        raise ConfigError(f"prefer={prefer!r}: expected one of {', '.join(PREFERENCES)}"
                          f"{nearest(prefer, PREFERENCES)}")
    samples = _samples(batch)
    if samples < 1:
        raise ConfigError(f"batch {batch!r} is not positive; write for example 8 or (8, 512)")
    if world_size != 1 and (rows, tokens, epochs) != (None, None, None):
        raise ConfigError("hours are told for one process: what several say to each other takes "
                          "time that is not counted; leave rows, tokens and epochs out")
    check_accumulation(accumulation)
    training = training_of(batch, samples * accumulation, rows, tokens, epochs)
    goal = goal_of(smaller, card, budget)
    settings = {"dtype": dtype_of(dtype), "targets": targets, "head": head, "loss": loss,
                "tasks": tasks, **World.of(world_size, shard, shard_offload).settings()}
    kind = torch.device(device).type
    named = isinstance(batch, int) or isinstance(batch, tuple) and all(
        isinstance(n, int) for n in batch)
    search = Search(model, budget, samples, lambda n: _part(batch, n), kind, settings,
                    _kept(model, settings, kind) if cache and named else None, accumulation)
    if candidates is not None:
        families = [[str(parse(c))] for c in candidates]
    else:                                     # as fit will train it
        families = shipped()
        search.usual = usual(search.shallows().model)
    found = search.all(families, prefer == "memory", workers, progress)
    of = kind_of(search.shallows().model, batch)
    plans = _ranked(search, found, prefer, rates(kind, card), of)
    plans.gpu, plans.shape = card.label if card else None, _shape(batch, samples)
    answered(plans, search, batch, training, limits, goal, lambda r: quality_of(r, of).score)
    return plans


def shipped() -> list[list[str]]:
    """The candidates of candidates.json: for each head its variants, fastest first."""
    data = json.loads(files("burnish.memory").joinpath("candidates.json").read_text("utf-8"))
    return [[str(parse(variant.format(head=head))) for variant in group["variants"]]
            for group in data.values() for head in group["heads"]]


def _name(part: str) -> str:
    return part.strip().partition("(")[0]


def _ranked(search: Search, families: list[Family], prefer: str, speed: Rates, kind: str) -> Plans:
    refused = {r: why for family in families for r, why in family.refused.items()}
    reasons = set(refused.values())
    found = [f for family in families for f in family.found]
    if not found and len(reasons) == 1:
        raise ConfigError(reasons.pop())      # the call is wrong, not the candidates
    unit = _whole_step(search, found, speed) if found else 1.0
    plans = _one_row_each([_plan(search, f, unit, speed, quality_of(f.recipe, kind))
                           for f in found])
    best = max((p.quality for p in plans), default=0.0)
    width = TIE * (best - min((p.quality for p in plans), default=0.0)) or 1.0
    keys = {
        "quality": lambda p: (int((best - p.quality) / width), p.time, p.needs),
        "speed": lambda p: (p.time, -p.quality, p.needs),
        "memory": lambda p: (p.needs, -p.quality, p.time),
        "size": lambda p: (p.adapter_bytes, -p.quality, p.time),
    }
    fits = sorted((p for p in plans if p.needs <= search.budget), key=keys[prefer])
    over = sorted((p for p in plans if p.needs > search.budget), key=lambda p: p.needs)
    notes = []
    if any(p.source.startswith("no measured") for p in plans):
        notes.append("recipes without measured quality are ranked at the mean of those with, those "
                     "without a backward at the least")
    if plans:
        first = fits[0] if fits else over[0]
        notes.append(f"quality is what a recipe may reach on {_task(kind)}, by the runs of the "
                     f"board (the first: {first.quality:.2f} ± {first.spread:.2f}): an order to "
                     "try them in, no promise for this task")
    return Plans(search.budget, search.samples, prefer, search.device, fits, over, refused, notes,
                 looked=len({f.recipe for f in found} | set(refused)), rates=speed)


def _task(kind: str) -> str:
    return {"image": "pictures", "text": "texts", "table": "tables", "sound": "sounds",
            "language": "language models"}.get(kind, "a task of any kind")


def _plan(search: Search, found: Found, unit: float, speed: Rates, quality: Quality) -> Plan:
    accumulate = search.times(found.samples)
    return Plan(found.recipe, found.report, found.samples, accumulate, found.needs, quality.score,
                quality.source, _seconds(found.report, accumulate, speed) / unit, quality.spread,
                seconds=speed.seconds(found.report, accumulate))


def _seconds(report: MemoryReport, accumulate: int, speed: Rates) -> float:
    """Of one update: the middle of the range, or by the round machine of machine.py."""
    if speed.known:
        return math.prod(speed.seconds(report, accumulate)) ** 0.5
    update = report.seconds.get("update", 0.0)
    return (sum(report.seconds.values()) - update) * accumulate + update


def _whole_step(search: Search, found: list[Found], speed: Rates) -> float:
    """Seconds of full fine-tuning with the whole batch: the unit of time. Where a model cannot be
    trained whole, the slowest of what was found."""
    try:
        _, report, _ = search.usual.run("full", lambda r: search.report(str(r), search.samples))
        return _seconds(report, search.accumulation, speed)
    except BurnishError:
        return max(_seconds(f.report, search.accumulation, speed) for f in found)


def _one_row_each(plans: list[Plan]) -> list[Plan]:
    """Recipes that say the same twice (`lean` is on by default) are one row, the shortest."""
    rows: dict[tuple[str, int], Plan] = {}
    for p in plans:
        key = _said_once(p.recipe), p.batch
        if key not in rows or len(p.recipe) < len(rows[key].recipe):
            rows[key] = p
    return list(rows.values())


def _said_once(recipe: str) -> str:
    """The recipe without parts that change nothing."""
    parts = [str(m) for m in parse(recipe) if not (m.name == "lean" and not m.changed())]
    return " + ".join(sorted(parts)) or "full"


def _kept(model: Any, settings: dict[str, Any], device: str) -> Reports | None:
    """Where reports of this question are kept; None for what a file cannot name."""
    if isinstance(model, nn.Module) or settings["loss"] is not None \
            or isinstance(settings["tasks"], Mapping) or not hasattr(model, "to_dict"):
        return None
    return Reports({"config": model.to_dict(), "class": type(model).__name__, "device": device,
                    **{k: str(v) for k, v in settings.items()}})


# -- batches --------------------------------------------------------------------------------------
def _samples(batch: Any) -> int:
    if isinstance(batch, int):
        return batch
    if isinstance(batch, tuple) and batch and all(isinstance(n, int) for n in batch):
        return batch[0]
    first = next(tensors(batch), None)
    if first is None:
        raise ConfigError("the batch holds no tensor; write for example 8 or (8, 512)")
    return first.shape[0]


def _shape(batch: Any, samples: int) -> str:
    numbers = batch if isinstance(batch, tuple) and all(isinstance(n, int) for n in batch) else ()
    return " x ".join(map(str, numbers)) or str(samples)


def _part(batch: Any, samples: int) -> Any:
    """The batch with its first `samples` samples."""
    if isinstance(batch, int):
        return samples
    if isinstance(batch, tuple) and all(isinstance(n, int) for n in batch):
        return (samples, *batch[1:])
    return cut(batch, samples)
