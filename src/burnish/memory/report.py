"""What a step takes, as read off the ledger: peak, categories, modules, timeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import FormatError
from .caching import replay
from .ledger import CATEGORIES, Ledger
from .stream import Reading, Stream
from .together import HOST
from .units import format_bytes, parse_bytes

__all__ = ["MemoryReport", "format_bytes", "parse_bytes"]

#: points kept of a timeline; each is the highest moment of its stretch
POINTS = 400


@dataclass
class MemoryReport:
    """Memory of a training step, in bytes.

    peak_bytes: the most that lives at once on `device`, allocator's rounding included.
    by_category: bytes at the peak; weights, gradients, optimizer, activations, temporary.
    by_module: bytes at the peak by the module they were made for.
    timeline: (event, {category: bytes}) over the last step simulated or measured, thinned so that
        every high point is kept.
    phases: (phase, first event) in the order they ran, over the same step.
    peak_at: (phase, module) of the moment of the peak.
    allocator: what the device's allocator would say of the whole run, in bytes: ``allocated``, and
        on CUDA ``active`` and ``reserved`` (caching.py).
    other_devices: peak bytes elsewhere (offloaded tensors), by device type.
    flops, half, traffic, swept, launches, seconds: of one step by phase, only when counted:
        floating-point operations, those in 16 bits, bytes read and written, those of operators that
        are no products, operators, and what a round machine would take for all (machine.py).
        rates.py makes the time of a known machine of them.
    trainable: number of trainable entries; adapter_bytes: bytes of what would be saved.
    world_size: processes that train together, of which this is one; shard: how the model stands in
        them ("ddp", "fsdp2"; None in one).
    accumulation: batches of that size in an update.
    stage: which stage of a recipe in stages this is; stages: peak bytes of each.
    """

    peak_bytes: int
    by_category: dict[str, int]
    by_module: dict[str, int] = field(repr=False)
    timeline: list[tuple[int, dict[str, int]]] = field(repr=False)
    peak_at: tuple[str, str]
    phases: list[tuple[str, int]] = field(default_factory=list, repr=False)
    device: str = "cpu"
    allocator: dict[str, int] = field(default_factory=dict, repr=False)
    other_devices: dict[str, int] = field(default_factory=dict, repr=False)
    source: str = "simulated"
    recipe: str = ""
    batch: str = ""
    trainable: int = 0
    adapter_bytes: int = 0
    flops: dict[str, float] = field(default_factory=dict, repr=False)
    half: dict[str, float] = field(default_factory=dict, repr=False)
    traffic: dict[str, float] = field(default_factory=dict, repr=False)
    swept: dict[str, float] = field(default_factory=dict, repr=False)
    launches: dict[str, float] = field(default_factory=dict, repr=False)
    seconds: dict[str, float] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)
    world_size: int = 1
    shard: str | None = None
    stage: str = ""
    accumulation: int = 1
    stages: dict[str, int] = field(default_factory=dict, repr=False)

    # -- from the ledger --------------------------------------------------------------------
    @classmethod
    def of(cls, ledger: Ledger, *, since: int = 0, device: str | None = None,
           label: str | None = None, **facts: Any) -> MemoryReport:
        """Everything the ledger knows.

        since: the event at which the last step began. device: whose memory is reported (default:
        the accelerator's, if there is one). label: the device type it stands for.
        """
        return cls.read(Stream.of(ledger, since=since, device=device, label=label,
                                  **{"notes": [], **facts}))

    @classmethod
    def read(cls, stream: Stream, path: Callable[[str, int], str] | None = None) -> MemoryReport:
        """What a stream says. path: how the modules of its signs are called (:class:`Reading`)."""
        facts = {k: v for k, v in stream.facts.items() if k not in ("device", "label")}
        told = Reading(stream, path)
        curves = told.curves()
        total = np.sum(list(curves.values()), axis=0)
        at = int(np.argmax(total)) if len(total) else 0
        return cls(
            peak_bytes=int(total[at]) if len(total) else 0,
            by_category={c: int(curves[c][at]) for c in CATEGORIES},
            by_module=told.modules(at),
            timeline=_thin(curves, total, told.since()),
            phases=told.phases() or [("load", 0)],
            peak_at=told.last_born(at),
            device=stream.facts["label"] or stream.facts["device"],
            allocator=_allocator(told, int(total.max()) if len(total) else 0),
            other_devices={"cpu" if d == HOST else d: n for d, n in told.elsewhere().items()},
            **stream.costs, **stream.counts, **facts,
        )

    # -- for people ---------------------------------------------------------------------------
    def text(self, modules: int = 6) -> str:
        """A short plain table."""
        head = f"{self.source} peak {format_bytes(self.peak_bytes)}"
        if self.recipe:
            head += f"  {self.recipe}"
        if self.batch:
            head += f"  batch {self.batch}"
        if self.accumulation > 1:
            head += f", {self.accumulation} to an update"
        if self.world_size > 1:
            head += f"  in each of {self.world_size} processes ({self.shard})"
        where = self.peak_at[0] + (f" of {self.peak_at[1]}" if self.peak_at[1] else "")
        lines = [head, f"reached in {where}, on {self.device}", ""]
        width = max(len(c) for c in CATEGORIES)
        for c in CATEGORIES:
            size = self.by_category.get(c, 0)
            share = size / self.peak_bytes if self.peak_bytes else 0.0
            bar = "#" * round(30 * share)
            lines.append(f"  {c:<{width}}  {format_bytes(size):>10}  {share:>4.0%}  {bar}")
        top = [(m or "(no module)", b) for m, b in self.by_module.items()][:modules]
        if top:
            lines += ["", "  largest modules at the peak"]
            width = max(len(m) for m, _ in top)
            lines += [f"  {m:<{width}}  {format_bytes(b):>10}" for m, b in top]
        if len(self.allocator) > 1:
            lines += ["", "  " + ", ".join(f"{k} {format_bytes(b)}"
                                           for k, b in self.allocator.items())]
        for d, b in self.other_devices.items():
            lines.append(f"  on {d}: {format_bytes(b)}")
        if self.stages:
            lines += ["", f"  the dearest stage is {self.stage}"]
            lines += [f"  {n}  {format_bytes(b):>10}" for n, b in self.stages.items()]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.text()

    # -- for programs ---------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain types only; :meth:`from_dict` gives the report back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MemoryReport:
        """The inverse of :meth:`to_dict`, also after a trip through JSON."""
        try:
            d = dict(data)
            d["timeline"] = [(int(n), dict(parts)) for n, parts in d["timeline"]]
            d["phases"] = [(str(p), int(n)) for p, n in d.get("phases", [])]
            d["peak_at"] = (str(d["peak_at"][0]), str(d["peak_at"][1]))
            return cls(**d)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise FormatError(f"this is not a memory report: {error}") from None

    def json(self, indent: int | None = None) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def picture(self, path: str | Path) -> Path:
        """Draw the step's timeline, stacked by category, into a PNG, SVG or PDF file."""
        from .picture import draw

        return draw(self, Path(path))


def _allocator(told: Reading, peak: int) -> dict[str, int]:
    """The figures of the device's allocator over the whole run."""
    if not told.facts.caches:
        return {"allocated": peak}
    return asdict(replay(told.lives()))


def _thin(curves: dict[str, np.ndarray], total: np.ndarray, since: int
          ) -> list[tuple[int, dict[str, int]]]:
    """At most POINTS moments from `since` on: the highest of each stretch, first and last."""
    end = len(total)
    if since >= end:
        return []
    edges = np.unique(np.linspace(since, end, POINTS - 1).astype(int))
    picks = {since, end - 1}
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        picks.add(int(a + np.argmax(total[a:b])))
    return [(n, {c: int(v[n]) for c, v in curves.items()}) for n in sorted(picks)]


