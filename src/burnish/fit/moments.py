"""The peaks of a run: promised for every moment before it begins, measured as each happens.

load        reading the model's files and joining the recipe, whichever takes more
train       a step of the longest batch
evaluate    the forward of the longest batch to be looked at, and its figures
save        writing the adapter
merge       folding the update into plain weights, which `burnish merge` does

What an optimizer holds is there while a run evaluates and saves, and counts in both; a merge comes
when it is gone. Everything is on the device where it happens: files are read, and recipes joined,
on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import BurnishError, CheckError, NoPlanError
from ..core.unread import is_unread
from ..engine.tuned import Tuned
from ..formats.safe import Tensors
from ..memory import Ledger, MemoryReport, format_bytes, parse_bytes, simulate
from ..memory.during import MOMENTS, evaluated, read, watching
from ..memory.extend import Shallows
from ..memory.reading import read_bytes, reading
from ..memory.simulate import SimulationError
from .arguments import Options
from .processes import world
from .promise import device
from .tasks import Task


@dataclass
class Moments:
    """moment -> bytes, before and after. on: whether anything is measured."""

    on: bool = True
    promised: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, int | None]]:
        """moment -> what was promised and what was measured, in the order of a run."""
        return {m: {"promised": self.promised.get(m), "measured": self.measured.get(m)}
                for m in MOMENTS if m in self.promised or m in self.measured}

    # -- promised ------------------------------------------------------------------------------
    def will(self, moment: str, size: int) -> None:
        self.promised[moment] = max(size, self.promised.get(moment, 0))

    def will_read(self, name: str, module: nn.Module) -> None:
        """What reading a folder's files takes; those of a hub are wherever its library keeps them.
        What waits in its files is read while the recipe is joined."""
        if not is_unread(module) and (folder := Path(name).expanduser()).is_dir():
            files = Tensors(folder)
            self.will("load", read_bytes({n: files.meta(n) for n in files}, module))

    def will_run(self, module: nn.Module, recipe: Any, promise: MemoryReport, batch: Any,
                 looked_at: tuple[Task, Any] | None, own: Options, memory: Any, say: Any,
                 names: Mapping[str, Any]) -> None:
        """All but the step, which `promise` is of. looked_at: the longest batch of an evaluation,
        with its task. names: task -> its batch, where there are several.

        Raises NoPlanError where an evaluation takes more than `memory`."""
        self.will("train", promise.peak_bytes)
        state = promise.by_category["optimizer"]
        common = dict(targets=own.targets, head=own.head, shallows=Shallows(module))
        several, here = world(own), next(module.parameters()).device.type
        for moment, where, more in (("load", here, 0), ("save", device(), state),
                                    ("merge", device(), 0)):
            if several.get("shard") == "fsdp2":       # no promise is made of these on shares
                break
            try:
                report = simulate(module, recipe, batch, during=moment, device=where, tasks=names,
                                  **common)
                self.will(moment, report.peak_bytes + more)
            except CheckError:                        # no form as plain weights
                continue
            except SimulationError as e:
                say(f"note: no promise of memory to {moment}, {e}")
        if looked_at is not None:
            task, largest = looked_at
            try:
                alone = simulate(module, recipe, largest, during="evaluate", device=device(),
                                 loss=answers(task), cached=0, tasks=dict.fromkeys(names, largest),
                                 **several, **common)
            except SimulationError as e:
                say(f"note: no promise of memory for evaluation, {e}")
            else:
                self.will("evaluate", alone.peak_bytes + state)
                self._must_fit(alone.batch, promise.peak_bytes, memory, say)
        say("  " + ", ".join(f"{m} {format_bytes(self.promised[m])}" for m in MOMENTS
                             if m in self.promised))

    def _must_fit(self, batch: str, step: int, memory: Any, say: Any) -> None:
        peak = self.promised["evaluate"]
        if peak > step:
            say(f"  evaluation, of batch {batch}, peaks at {format_bytes(peak)}")
        limit = parse_bytes(memory) if memory is not None else None
        if limit is not None and peak > limit:
            raise NoPlanError(f"evaluation of batch {batch} needs {format_bytes(peak)}, more "
                              f"than the {format_bytes(limit)} asked for; give a smaller "
                              "per_device_eval_batch_size=")

    # -- measured ------------------------------------------------------------------------------
    def was(self, moment: str, report: MemoryReport) -> None:
        self.measured[moment] = max(report.peak_bytes, self.measured.get(moment, 0))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While the model's files are read."""
        if not self.on:
            yield
            return
        with reading() as seen:
            yield
        self.was("load", seen[0])

    @contextlib.contextmanager
    def watched(self, moment: str, model: nn.Module, tuned: Tuned | None = None) -> Iterator[None]:
        """While a recipe is joined, or an adapter written."""
        if not self.on or tuned is not None and tuned.state.shards is not None:
            yield
            return
        with watching(model, tuned, _held(tuned)) as seen:
            yield
        self.was(moment, seen[0])

    def evaluates(self, tuned: Tuned, task: Task, batch: Any) -> None:
        """Looks at the longest batch once more, as the run has just done."""
        if not self.on or tuned.state.shards is not None:
            return
        ledger = Ledger(tuned.model)
        ledger.watch("optimizer", _held(tuned))
        evaluated(tuned, ledger, batch, answers(task))
        self.was("evaluate", read(tuned.model, ledger))

    def merges(self, tuned: Tuned) -> None:
        """Merges and takes it back, where that takes no more than the run has taken already."""
        most = max([self.measured.get(m, 0) for m in MOMENTS])
        if not self.on or not 0 < self.promised.get("merge", 0) <= most:
            return
        try:
            with watching(tuned.model, tuned) as seen:
                tuned.merge()
        except BurnishError:                          # it would drift: `burnish merge` says so
            return
        tuned.unmerge()
        self.was("merge", seen[0])


def longest(tasks: Mapping[str, Task], size: int, test: bool | None, plain: bool
            ) -> tuple[Task, Any] | None:
    """(task, batch) of the most entries among the splits that a run looks at."""
    found = [(t, t.example(size, s)) for t in tasks.values() for s in t.data.splits
             if s != "train" and (s != "test" or test is not False)]
    if not found:
        return None
    task, batch = max(found, key=lambda f: max(v.numel() for v in f[1].values()))
    return task, task.call(batch, plain)[0]


def answers(task: Task) -> Any:
    """What evaluation makes of the model's answer to a batch: figures of its logits, and what it
    writes, the longest there may be."""
    def made(model: Any, out: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        return task.looked(model, batch if isinstance(batch, Mapping) else batch[1], out, True)

    return made


def _held(tuned: Tuned | None) -> list[Any]:
    """What updates have left: the optimizer's state, and that of budgets and schedules."""
    if tuned is None:
        return []
    optimizer = tuned.current_optimizer
    return [list(optimizer.state.values()) if optimizer is not None else [],
            tuned.timeline.state()["handlers"]]
