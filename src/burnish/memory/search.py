"""Looks for the recipes that fit: simulates what is needed and no more.

A family is one way of training; its variants hold the frozen weights or the tape differently. The
families know nothing of each other, so two processes may look at two of them at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core.errors import BurnishError
from ..core.recipe import parse
from .cache import Reports
from .extend import Shallows, repeats
from .fakes import from_config
from .report import MemoryReport
from .simulate import simulate
from .usual import AS_SAID

#: what a device takes before the first tensor (context, libraries), and what is lost to
#: fragmentation, as a share of the peak; by device type
OVERHEAD = {"cuda": 600 * 2**20}
SLACK = {"cuda": 0.05}

#: seconds after which a bar may move
MOVES = 0.1

#: called as candidates are done, or left out: how many are, of how many
Progress = Callable[[int, int], None]


@dataclass
class Found:
    """One simulation of the search: a recipe with so many samples at once."""

    recipe: str
    samples: int
    report: MemoryReport
    needs: int


@dataclass
class Family:
    """What became of the variants of one way of training."""

    found: list[Found] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    reports: dict[tuple[str, int, bool], MemoryReport] = field(default_factory=dict)


class Search:
    """model: a module or a config, built when the first simulation asks for it.

    part: samples -> the batch with so many. budget in bytes. kept: reports of earlier searches.
    accumulation: batches of `samples` in an update; of fewer samples there are as many more.
    """

    def __init__(self, model: Any, budget: int, samples: int, part: Callable[[int], Any],
                 device: str, settings: dict[str, Any], kept: Reports | None = None,
                 accumulation: int = 1):
        self.source, self.budget, self.samples, self.part = model, budget, samples, part
        self.accumulation = accumulation
        self.device, self.settings, self.kept = device, settings, kept
        self.reports: dict[tuple[str, int, bool], MemoryReport] = {}
        self.usual = AS_SAID                  # what recipes are given
        self._shallows: Shallows | None = None
        self._looking_back = False
        self._looked: Callable[[int], None] = lambda n: None     # so many candidates more are done

    # -- one simulation -----------------------------------------------------------------------
    def shallows(self) -> Shallows:
        if self._shallows is None:
            model = self.source if isinstance(self.source, nn.Module) else from_config(
                self.source, self.settings.get("dtype"))
            self._shallows = Shallows(model)
        return self._shallows

    def like(self, part: Callable[[int], Any]) -> Search:
        """The same question for other batches."""
        other = Search(self.source, self.budget, self.samples, part, self.device, self.settings,
                       self.kept, self.accumulation)
        other.usual, other._shallows = self.usual, self.shallows()
        return other

    def times(self, samples: int) -> int:
        """Batches of so many samples in an update."""
        return self.accumulation * -(-self.samples // samples)

    def report(self, recipe: str, samples: int, times: int | None = None) -> MemoryReport:
        """times: batches in an update; the default makes it as large as was asked for."""
        times = self.times(samples) if times is None else times
        key = recipe, samples, times > 1
        if key not in self.reports:
            batch = self.part(samples)

            def make() -> MemoryReport:
                if self._looking_back:
                    raise _Absent
                shallows = self.shallows()
                return simulate(shallows.model, recipe, batch, device=self.device, count=True,
                                shallows=shallows, accumulation=times, **self.settings)

            kept = self.kept if _ours(recipe) else None
            self.reports[key] = kept.get(recipe, [batch, times > 1], make) if kept else make()
        self.reports[key].accumulation = times           # what is kept may be of another number
        return self.reports[key]

    def at(self, recipe: str, samples: int, times: int | None = None) -> Found:
        report = self.report(recipe, samples, times)
        return Found(recipe, samples, report, self.needs(report))

    def needs(self, report: MemoryReport) -> int:
        """Bytes of the budget it takes: the peak, and the device's own share."""
        slack = SLACK.get(self.device, 0.0)
        return math.ceil(report.peak_bytes * (1 + slack)) + OVERHEAD.get(self.device, 0)

    # -- one family ---------------------------------------------------------------------------
    def family(self, recipes: Sequence[str], thorough: bool) -> Family:
        """Variants of one way of training, fastest first. Where one fits with the whole batch the
        slower ones are left out (unless `thorough`): they train the same thing."""
        out = Family()
        k = 0
        for k, recipe in enumerate(recipes):
            self._looked(min(k, 1))           # the one before
            try:
                _, found, _ = self.usual.run(recipe, lambda r: self.largest(str(r)))
            except BurnishError as error:
                out.refused[recipe] = str(error)
                continue
            out.found.append(found)
            fits = found.needs <= self.budget
            if fits and found.samples == self.samples and not thorough:
                break                         # the rest of the family is slower and no better
            if not fits and k < len(recipes) - 2 and not self._hopeful(recipes[-1], out):
                break
        self._looked(len(recipes) - k)        # the last one, and those that were left out
        out.reports = self.reports
        return out

    def _hopeful(self, leanest: str, out: Family) -> bool:
        """Does a family's leanest variant fit with one sample? If not, none does."""
        try:
            _, least, _ = self.usual.run(leanest, lambda r: self.at(str(r), 1))
        except BurnishError:
            return True
        if least.needs > self.budget:
            out.found.append(least)
        return least.needs <= self.budget

    def largest(self, recipe: str) -> Found:
        """With the largest part of the batch that fits, else with one sample."""
        levels = [self.samples]               # halving, rounded up so that the parts cover it
        while levels[-1] > 1:
            levels.append(-(-levels[-1] // 2))
        found = self.at(recipe, levels[0])
        k = 0
        while found.needs > self.budget and k < len(levels) - 1:
            k = max(k + 1, self._guess(found, levels, k))
            try:
                smaller = self.at(recipe, levels[k])
            except BurnishError:              # an update of several batches is refused there
                return found
            if smaller.needs > found.needs:   # a smaller batch does not help
                return found
            found = smaller
        return found

    def _guess(self, known: Found, levels: list[int], k: int) -> int:
        """The first level that should fit: what stays whatever the batch, and a share per sample.
        Generous (a level is simulated before it is believed), so that no larger one is missed."""
        parts = known.report.by_category
        stays = parts["weights"] + parts["optimizer"] + parts["gradients"]
        grows = (known.needs - stays) / levels[k]
        return next((j for j in range(k + 1, len(levels))
                     if stays + grows * levels[j] <= 1.02 * self.budget), len(levels) - 1)

    # -- all families ---------------------------------------------------------------------------
    def all(self, families: Sequence[Sequence[str]], thorough: bool, workers: int | None,
            progress: Progress | None) -> list[Family]:
        """What became of each family, in their order."""
        out: dict[int, Family] = {}
        total, count = sum(len(f) for f in families), 0

        def done(n: int, family: Family) -> None:
            out[n] = family
            self.reports.update(family.reports)

        def looked(n: int) -> None:
            nonlocal count
            count = min(count + n, total)     # what a broken process counted is done again
            if progress is not None:
                progress(count, total)

        looked(0)
        for n, family in self._kept(families, thorough):
            done(n, family)
            looked(len(families[n]))
        processes = _workers(len(families)) if workers is None else min(workers, len(families))
        with _still():
            if processes > 1 and len(out) < len(families):
                _in_processes(self, {n: f for n, f in enumerate(families) if n not in out},
                              thorough, processes, done, looked)
            self._looked = looked
            for n, recipes in enumerate(families):
                if n not in out:
                    done(n, self.family(recipes, thorough))
        if self.kept is not None:
            self.kept.tidy()
        return [out[n] for n in range(len(families))]

    def _kept(self, families: Sequence[Sequence[str]], thorough: bool
              ) -> Iterator[tuple[int, Family]]:
        """The families that reports of earlier searches answer."""
        if self.kept is None:
            return
        self._looking_back = True
        try:
            for n, recipes in enumerate(families):
                with contextlib.suppress(_Absent):
                    yield n, self.family(recipes, thorough)
        finally:
            self._looking_back = False


class _Absent(Exception):
    """A report that is not kept, where only those are asked for."""


def _ours(recipe: str) -> bool:
    """Is its code part of burnish, whose hash is in the name of what is kept?"""
    return all(type(m).__module__.startswith("burnish.methods.") for m in parse(recipe))


@contextlib.contextmanager
def _still() -> Iterator[None]:
    """What is loaded now stays: the collector need not look through it at every turn."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# -- processes ----------------------------------------------------------------------------------
#: the search of the process that forks, for its workers
_search: Search | None = None


def _workers(families: int) -> int:
    """How many processes pay: as many as there are cores, where they start for nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if families < 4 or not sys.platform.startswith("linux") or threading.active_count() > 1 \
            or torch.cuda.is_initialized():
        return 1
    return min(cores or 1, families)


def _in_processes(search: Search, families: Mapping[int, Sequence[str]], thorough: bool,
                  workers: int, done: Callable[[int, Family], None],
                  looked: Callable[[int], None]) -> None:
    """As many families as processes can be had for. What they leave undone is done here."""
    global _search
    _search = search
    search.shallows()                         # made once, for all
    slow = {n: any(repeats(parse(r), search.settings.get("targets")) is None for r in family)
            for n, family in families.items()}
    order = sorted(families, key=lambda n: (not slow[n], -len(families[n])))
    fork = multiprocessing.get_context("fork")
    counter: Any = fork.Value("i", 0)
    search._looked = partial(_add, counter)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(families)), fork, _ready, (os.getpid(),))
    told = 0
    try:
        waiting = {pool.submit(_look, families[n], thorough): n for n in order}
        while waiting:
            ended, _ = wait(waiting, MOVES, FIRST_COMPLETED)
            for future in ended:
                done(waiting.pop(future), future.result())
            now = counter.get_obj().value     # a worker that was killed may hold the lock
            if now > told:
                looked(now - told)
                told = now
    except (BrokenProcessPool, OSError, RuntimeError):
        pass
    except BaseException:                     # Ctrl-C: nobody waits for what they are doing
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        _search = None


def _add(counter: Any, n: int) -> None:
    with counter.get_lock():
        counter.value += n


def _ready(parent: int) -> None:
    """A worker that could not run backward (its parent has, with threads it does not have) or whose
    threads are gone ends at once; and so does one whose parent is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # the parent hears it, and ends us
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG
    if os.getppid() != parent:                           # gone before that was said
        os._exit(1)
    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).sum().backward()


def _look(family: Sequence[str], thorough: bool) -> Family:
    assert _search is not None
    _search.reports = {}
    return _search.family(family, thorough)
