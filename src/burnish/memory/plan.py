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
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BurnishError, ConfigError, nearest
from ..core.recipe import parse
from .fakes import from_config
from .report import MemoryReport
from .simulate import _dtype, simulate
from .units import format_bytes, parse_bytes
from .usual import usual

#: what a device takes before the first tensor (context, libraries), and what is lost to
#: fragmentation, as a share of the peak; by device type
OVERHEAD = {"cuda": 600 * 2**20}
SLACK = {"cuda": 0.05}

PREFERENCES = ("quality", "speed", "memory", "size")


@dataclass
class Plan:
    """One recipe with its promise.

    recipe: the expression to pass on. batch: samples at once; accumulate: such batches per update.
    needs: bytes of the budget it takes (the peak, and the device's own share).
    quality: the prior of its head, in [0, 1]; source: where that comes from.
    time: of one update, relative to full fine-tuning of the whole batch (1.0).
    """

    recipe: str
    report: MemoryReport
    batch: int
    accumulate: int
    needs: int
    quality: float
    source: str
    time: float
    notes: list[str] = field(default_factory=list)

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
                "source": self.source, "time": self.time, "trainable": self.trainable,
                "adapter_bytes": self.adapter_bytes, "notes": self.notes, "report": report}


@dataclass
class Plans:
    """Ranked plans for a budget.

    fits: what fits, best first. over: what does not, least memory first.
    refused: recipe -> why it could not be simulated on this model.
    """

    budget: int
    batch: int
    prefer: str
    device: str
    fits: list[Plan]
    over: list[Plan]
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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

    def __iter__(self):
        return iter(self.fits)

    def __len__(self) -> int:
        return len(self.fits)

    def to_dict(self) -> dict[str, Any]:
        return {"budget": self.budget, "batch": self.batch, "prefer": self.prefer,
                "device": self.device, "fits": [p.to_dict() for p in self.fits],
                "over": [p.to_dict() for p in self.over], "refused": self.refused,
                "missing_bytes": self.missing_bytes, "notes": self.notes}

    def json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def text(self, rows: int = 12) -> str:
        """A plain table of what fits, or of what comes closest and what is missing."""
        budget = format_bytes(self.budget)
        lines = [f"{len(self.fits)} recipes fit {budget} on {self.device} "
                 f"(batch {self.batch}, by {self.prefer})"]
        shown = self.fits or self.over
        if not self.fits:
            lines = [f"nothing fits {budget} on {self.device} (batch {self.batch})"]
            if self.cheapest is not None:
                lines.append(f"the cheapest, {self.cheapest.recipe}, needs "
                             f"{format_bytes(self.cheapest.needs)}: "
                             f"{format_bytes(self.missing_bytes)} more")
        if shown:
            lines += ["", *_table(shown[:rows], self.budget)]
        if len(shown) > rows:
            lines.append(f"... and {len(shown) - rows} more")
        for why in dict.fromkeys(self.refused.values()):
            first, *rest = (r for r, reason in self.refused.items() if reason == why)
            lines.append(f"not possible here: {first}{f' and {len(rest)} more' if rest else ''}: "
                         f"{why}")
        lines += [f"note: {n}" for n in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def plan(model: Any, memory: str | int = "8GB", batch: Any = 8, prefer: str | None = None,
         candidates: Iterable[str] | None = None, *, dtype: Any = None, targets: Any = None,
         head: bool | str = "auto", device: str = "cpu", loss: Any = None, tasks: int = 0) -> Plans:
    """Recipes that train `model` within `memory`, ranked.

    model: a module or a transformers config, as for :func:`burnish.simulate`.
    memory: the budget, as text (:func:`parse_bytes`) or bytes. On CPU it is for the step's tensors
        (the process itself takes about 0.4 GB more); on an accelerator the device's context and a
        share for fragmentation are taken off (:data:`OVERHEAD`, :data:`SLACK`).
    batch: samples, (samples, tokens) or a batch of tensors: the effective batch of an update. It
        may be halved and accumulated to fit.
    prefer: "quality" (default), then "speed", "memory" or "size" (of the adapter file).
    candidates: expressions to consider instead of the shipped list; each is one plan, with no
        variants added.
    tasks: as for :func:`burnish.simulate`; a recipe in stages needs what its dearest stage does.

    Nothing fitting is no error: ``fits`` is empty, ``cheapest`` and ``missing_bytes`` say how far
    it is. Raises ConfigError for a budget, batch or preference that makes no sense.
    """
    budget = parse_bytes(memory)
    prefer = prefer or "quality"
    if prefer not in PREFERENCES:
        raise ConfigError(f"prefer={prefer!r}: expected one of {', '.join(PREFERENCES)}"
                          f"{nearest(prefer, PREFERENCES)}")
    if not isinstance(model, nn.Module):
        model = from_config(model, _dtype(dtype))
    search = _Search(model, budget, batch, device,
                     {"dtype": dtype, "targets": targets, "head": head, "loss": loss,
                      "tasks": tasks})
    families = [[str(parse(c))] for c in candidates] if candidates is not None else shipped()
    if candidates is None:                    # as fit will train it
        given = usual(model)
        families = [[str(given(r)) for r in family] for family in families]
    for family in families:
        search.family(family, thorough=prefer == "memory")
    reasons = set(search.refused.values())
    if not search.plans and len(reasons) == 1:
        raise ConfigError(reasons.pop())      # the call is wrong, not the candidates
    return search.result(prefer)


def shipped() -> list[list[str]]:
    """The candidates of candidates.json: for each head its variants, fastest first."""
    data = json.loads(files("burnish.memory").joinpath("candidates.json").read_text("utf-8"))
    return [[str(parse(variant.format(head=head))) for variant in group["variants"]]
            for group in data.values() for head in group["heads"]]


def _name(part: str) -> str:
    return part.strip().partition("(")[0]


class _Search:
    """Simulates what is needed and no more."""

    def __init__(self, model: nn.Module, budget: int, batch: Any, device: str,
                 settings: dict[str, Any]):
        self.model, self.budget, self.batch, self.settings = model, budget, batch, settings
        self.device = torch.device(device).type
        self.samples = _samples(batch)
        if self.samples < 1:
            raise ConfigError(f"batch {batch!r} is not positive; write for example 8 or (8, 512)")
        self.plans: list[Plan] = []
        self.refused: dict[str, str] = {}
        self.baseline: float | None = None
        self.reports: dict[tuple[str, int], MemoryReport] = {}

    def family(self, recipes: list[str], thorough: bool) -> None:
        """Variants of one way of training, fastest first."""
        for k, recipe in enumerate(recipes):
            try:
                found = self._largest(recipe)
            except BurnishError as error:
                self.refused[recipe] = str(error)
                continue
            self.plans.append(found)
            fits = found.needs <= self.budget
            if fits and found.accumulate == 1 and not thorough:
                return                        # the rest of the family is slower and no better
            if not fits and k < len(recipes) - 2 and not self._hopeful(recipes[-1]):
                return

    def _hopeful(self, leanest: str) -> bool:
        """Does a family's leanest variant fit with one sample? If not, none does."""
        try:
            least = self._at(leanest, 1)
        except BurnishError:
            return True
        if least.needs > self.budget:
            self.plans.append(least)
        return least.needs <= self.budget

    def _largest(self, recipe: str) -> Plan:
        """The plan with the largest part of the batch that fits, else that with one sample."""
        levels = [self.samples]               # halving, rounded up so that the parts cover it
        while levels[-1] > 1:
            levels.append(-(-levels[-1] // 2))
        found = self._at(recipe, levels[0])
        k = 0
        while found.needs > self.budget and k < len(levels) - 1:
            k = max(k + 1, self._guess(found, levels, k))
            smaller = self._at(recipe, levels[k])
            if smaller.needs > found.needs:   # a smaller batch does not help
                return found
            found = smaller
        return found

    def _guess(self, known: Plan, levels: list[int], k: int) -> int:
        """The first level that should fit: what stays whatever the batch, and a share per sample.
        Generous (a level is simulated before it is believed), so that no larger one is missed."""
        parts = known.report.by_category
        stays = parts["weights"] + parts["optimizer"] + parts["gradients"]
        grows = (known.needs - stays) / levels[k]
        return next((j for j in range(k + 1, len(levels))
                     if stays + grows * levels[j] <= 1.02 * self.budget), len(levels) - 1)

    def _at(self, recipe: str, samples: int) -> Plan:
        report = self._report(recipe, samples)
        accumulate = -(-self.samples // samples)
        seconds = report.seconds
        update = seconds.get("update", 0.0)
        time = (sum(seconds.values()) - update) * accumulate + update
        quality, source = quality_of(recipe)
        return Plan(recipe, report, samples, accumulate, self._needs(report), quality, source,
                    time / self._full())

    def _report(self, recipe: str, samples: int) -> MemoryReport:
        key = recipe, samples
        if key not in self.reports:
            self.reports[key] = simulate(
                self.model, recipe, _part(self.batch, samples), device=self.device, count=True,
                **self.settings)
        return self.reports[key]

    def _full(self) -> float:
        """Seconds of full fine-tuning with the whole batch: the unit of time."""
        if self.baseline is None:
            self.baseline = sum(self._report("full", self.samples).seconds.values())
        return self.baseline

    def _needs(self, report: MemoryReport) -> int:
        slack = SLACK.get(self.device, 0.0)
        return math.ceil(report.peak_bytes * (1 + slack)) + OVERHEAD.get(self.device, 0)

    def result(self, prefer: str) -> Plans:
        keys = {
            "quality": lambda p: (-round(p.quality, 3), p.time, p.needs),
            "speed": lambda p: (p.time, -p.quality, p.needs),
            "memory": lambda p: (p.needs, -p.quality, p.time),
            "size": lambda p: (p.adapter_bytes, -p.quality, p.time),
        }
        fits = sorted((p for p in self.plans if p.needs <= self.budget), key=keys[prefer])
        over = sorted((p for p in self.plans if p.needs > self.budget), key=lambda p: p.needs)
        notes = []
        unknown = sorted({p.source for p in self.plans if p.source.startswith("no measured")})
        if unknown:
            notes.append("recipes without measured quality are ranked at the mean of those with")
        return Plans(self.budget, self.samples, prefer, self.device, fits, over, self.refused,
                     notes)


# -- quality ------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _priors() -> dict[str, dict[str, Any]]:
    """quality.json: recipe head -> {"score": in [0, 1], "source": text}."""
    file = files("burnish.memory").joinpath("quality.json")
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def quality_of(recipe: str) -> tuple[float, str]:
    """(prior, its source) of a recipe: the longest head in quality.json that it contains."""
    priors = {k: v for k, v in _priors().items() if isinstance(v, Mapping) and "score" in v}
    parts = parse(recipe)
    whole, names = {str(m) for m in parts}, {m.name for m in parts}
    best: tuple[int, int, str] | None = None
    for key in priors:
        wanted = [p.strip() for p in key.split("+")]
        exact = all(w in whole for w in wanted)
        if exact or all(_name(w) in names for w in wanted):
            rank = (len(wanted), exact, key)
            best = rank if best is None or rank[:2] > best[:2] else best
    if best is not None:
        found = priors[best[2]]
        return float(found["score"]), str(found.get("source", ""))
    mean = sum(float(v["score"]) for v in priors.values()) / len(priors) if priors else 0.5
    return mean, f"no measured quality for {recipe}"


# -- batches --------------------------------------------------------------------------------------
def _samples(batch: Any) -> int:
    if isinstance(batch, int):
        return batch
    if isinstance(batch, tuple) and batch and all(isinstance(n, int) for n in batch):
        return batch[0]
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim()]
    if not sizes:
        raise ConfigError("the batch holds no tensor; write for example 8 or (8, 512)")
    return sizes[0]


def _part(batch: Any, samples: int) -> Any:
    """The batch with its first `samples` samples."""
    if isinstance(batch, int):
        return samples
    if isinstance(batch, tuple) and all(isinstance(n, int) for n in batch):
        return (samples, *batch[1:])
    whole = _samples(batch)

    def cut(v: Any) -> Any:
        return v[:samples] if isinstance(v, Tensor) and v.dim() and v.shape[0] == whole else v

    if isinstance(batch, Mapping):
        return {k: cut(v) for k, v in batch.items()}
    return type(batch)(cut(v) for v in batch)


# -- the table --------------------------------------------------------------------------------
def _table(plans: list[Plan], budget: int) -> list[str]:
    head = ("", "recipe", "batch", "peak", "of budget", "time", "quality", "trainable", "adapter")
    rows = [head]
    for n, p in enumerate(plans, 1):
        batch = f"{p.batch} x {p.accumulate}" if p.accumulate > 1 else str(p.batch)
        quality = "?" if p.source.startswith("no measured") else f"{p.quality:.2f}"
        rows.append((str(n), p.recipe, batch, format_bytes(p.peak_bytes),
                     f"{p.needs / budget:.0%}", f"{p.time:.2f}", quality, f"{p.trainable:,}",
                     format_bytes(p.adapter_bytes)))
    widths = [max(len(r[k]) for r in rows) for k in range(len(head))]
    return ["  ".join(c.ljust(w) if k == 1 else c.rjust(w)
                      for k, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
            for r in rows]
