"""Zeroth-order steps on a function that only answers with numbers, and a log of what it was asked.

A query may cost money and minutes, so none is made twice: every answer is on disk before it is
used. A run that is started again reads its log, repeats the finished updates from the answers alone
and goes on in the middle of the one that was cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..blocks.update.noise import fold
from ..blocks.update.precise import host_float
from ..blocks.update.scratch import Scratch
from ..blocks.update.step import compose
from ..blocks.update.zeroth import ZerothOrder, ZerothOrderOptimizer
from ..core.errors import BurnishError, ConfigError, FormatError, RecipeError
from ..core.recipe import parse

#: ``evaluate(params, batch, query_seed) -> float``
Objective: TypeAlias = Callable[[dict[str, Tensor], Any, int], float]
VERSION = 1


class BlackBox:
    """What trains on our side of an objective that has neither weights nor gradients to show.

        box = BlackBox(evaluate, {"prompt": prompt}, "spsa_gc(queries=1)", lr=0.01,
                       budget=5000, log="queries.jsonl")
        for batch in batches[box.updates:]:
            loss = box.step(batch)

    evaluate: ``evaluate(params, batch, query_seed) -> float``, the loss (less is better). params
        are copies of what trains, by name; query_seed is one number an update, for whatever the
        service draws: all evaluations of an update draw alike. It may be called from two threads.
    params: name -> floating-point tensor, moved in place.
    recipe: zeroth-order update rules: `mezo`, `zo`, `mezo_svrg`, `spsa_gc`, and their wrappers.
    lr: learning rate; may be changed between steps (``box.lr``).
    budget: most that may be spent, in units of `cost` a query; None: anything. A step that cannot
        be paid stops with BurnishError: the weights are those before it, and the answers that it
        got are not asked for again when the budget is raised.
    log: a file, one line an answer, written and synchronised before the answer is used. If it is
        there it must be of this run (recipe, seed, names, shapes and starting values: else
        FormatError): finished updates are repeated from it, bit for bit and without a query. Only
        its last line may be torn. None: nothing is kept.
    concurrency: queries at a time: 2 asks both points of a probe together, 1 in turn.
    seed: of probes and of query seeds.

    updates: how many are done; in a run that was resumed, the number of the batch it wants next.
    queries: answers so far, those of the log included.  spent: ``cost * queries``.

    Raises ConfigError for answers that are no number, and for another batch in the middle of an
    update than the one it began with; RecipeError for parts that are no zeroth-order rule. An error
    of `evaluate` becomes a BurnishError; the same step may be tried again.
    """

    def __init__(self, evaluate: Objective, params: Mapping[str, Tensor], recipe: str = "spsa_gc",
                 *, lr: float, budget: float | None = None, cost: float = 1.0,
                 log: str | os.PathLike[str] | None = None, concurrency: int = 2, seed: int = 0):
        if concurrency not in (1, 2):
            raise ConfigError(f"concurrency={concurrency}: a probe is two points; expected 1 or 2")
        if not cost > 0 or budget is not None and not budget >= 0:
            raise ConfigError(f"budget={budget}, cost={cost}: a query costs more than nothing, and "
                              "a budget is at least 0, or None for anything")
        self.evaluate, self.budget, self.cost = evaluate, budget, cost
        self.concurrency, self.seed, self.queries = concurrency, seed, 0
        self._named = {n: _trained(n, p) for n, p in params.items()}
        if not self._named:
            raise ConfigError("nothing trains: params is empty")
        self.optimizer = self._optimizer(recipe, lr)
        self._known: dict[int, dict[str, Any]] = {}  # answers of the update under way
        self._log = None
        if log is not None:
            self._log = Log(Path(log), {
                "queries": VERSION, "recipe": str(parse(recipe)), "seed": seed,
                "params": {n: list(p.shape) for n, p in self._named.items()},
                "start": digest(list(self._named.values()))})
            self._repeat(self._log.rows)

    def _optimizer(self, recipe: str, lr: float) -> ZerothOrderOptimizer:
        answers = []
        for part in parse(recipe):
            answer = part.optimizer() if "optimizer" in part.axes() else None
            if set(part.axes()) != {"optimizer"} or answer is None:
                raise RecipeError(f"{part.name} changes a model, and a black box has none to show; "
                                  "expected update rules alone: spsa_gc, mezo, zo, mezo_svrg")
            answers.append(answer)
        if not any(isinstance(a, ZerothOrder) and not a.reads_model for a in answers):
            raise RecipeError(f"{recipe} reads gradients or a model; a black box answers with "
                              "numbers: take spsa_gc, mezo, zo or mezo_svrg")
        made = compose(answers, self._named.items(), lr, seed=self.seed)
        assert isinstance(made, ZerothOrderOptimizer)
        return made

    # -- what it says ----------------------------------------------------------------------------
    @property
    def updates(self) -> int:
        return int(self.optimizer.param_groups[0]["updates"])

    @property
    def spent(self) -> float:
        return self.cost * self.queries

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    # -- the step --------------------------------------------------------------------------------
    def step(self, batch: Any = None) -> float:
        """One update; the mean of the losses seen."""
        mark, rate = digest(batch), self.lr
        for row in list(self._known.values())[:1]:
            if row["batch"] != mark:
                raise ConfigError(f"update {self.updates} was cut off after {len(self._known)} "
                                  "answers on another batch; go on with the batch it began with "
                                  f"(number {self.updates} of the run)")
            self.lr = row["lr"]                      # the rate that its answers were asked for at
        try:
            return self._drive(batch, mark)
        finally:
            self.lr = rate

    @torch.no_grad()
    def _drive(self, batch: Any, mark: str) -> float:
        at, opt = 0, self.optimizer
        opt.smooth = False                           # a service may round what it says
        with closing(opt.passes()) as passes:
            where = next(passes)
            while True:
                probe = getattr(where, "where", None)
                with where:
                    wanted = [(_scale(probe), self._copies())]
                if at not in self._known and self.concurrency == 2 and self._paired(at, probe):
                    with Scratch(probe.named.items(), probe.seed, -probe.scale, None, probe.noise,
                                 probe.elsewhere):
                        wanted.append((-probe.scale, self._copies()))
                self._ask(at, wanted, batch, mark)
                row = self._known[at]
                if row["scale"] != wanted[0][0]:
                    raise FormatError(f"update {self.updates} asks at {wanted[0][0]!r} and its log "
                                      f"has an answer at {row['scale']!r}: it is of another run")
                at += 1
                try:
                    where = passes.send(row["value"])
                except StopIteration as done:
                    self._known.clear()
                    return float(done.value)

    def _paired(self, at: int, probe: Any) -> bool:
        """Does the next question stand at the mirrored point?"""
        spec = self.optimizer.spec
        return isinstance(probe, Scratch) and spec.width == 2 and at % 2 == 0 and \
            not getattr(spec, "conservative", False)

    def _copies(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self._named.items()}

    def _ask(self, at: int, wanted: list[tuple[float, dict[str, Tensor]]], batch: Any, mark: str
             ) -> None:
        """The answers at number `at` and on, into what is known of this update."""
        update = self.updates
        open_ = {at + i: w for i, w in enumerate(wanted) if at + i not in self._known}
        if open_ and self.budget is not None and self.spent + self.cost * len(open_) > self.budget:
            raise BurnishError(
                f"the budget of {self.budget:g} is spent: {self.queries} queries cost "
                f"{self.spent:g}, and update {update} asks {len(open_)} more; the weights are "
                "those before it, and what it was answered so far is kept")
        seed = fold("ask", self.seed, update) & 0x7FFFFFFF
        failed: BaseException | None = None
        with ThreadPoolExecutor(len(open_) or 1) as pool:
            jobs = {pool.submit(self.evaluate, params, batch, seed): (number, scale)
                    for number, (scale, params) in open_.items()}
            for job in as_completed(jobs):
                number, scale = jobs[job]
                if (error := job.exception()) is not None:
                    failed = error
                    continue
                self.queries += 1
                row = {"update": update, "at": number, "scale": scale,
                       "value": _number(job.result()), "lr": self.lr, "batch": mark}
                if self._log is not None:
                    self._log.append(row)
                self._known[number] = row
        if isinstance(failed, BurnishError) or failed is not None and \
                not isinstance(failed, Exception):
            raise failed
        if failed is not None:
            raise BurnishError(
                f"a query of update {update} failed with {type(failed).__name__}: {failed}; the "
                f"weights are those before it and {len(self._known)} answers of it are kept: "
                "try the same step again") from failed

    # -- a run that goes on ----------------------------------------------------------------------
    def _repeat(self, rows: Iterable[dict[str, Any]]) -> None:
        """The finished updates of a log, from its answers; what is left is of the next one."""
        by: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by.setdefault(row["update"], []).append(row)
            self.queries += 1
        rate, budget = self.lr, self.budget
        for update in sorted(by):
            if update != self.updates:
                raise FormatError(f"the log has answers of update {update} and none that finish "
                                  f"update {self.updates}")
            self._known = {row["at"]: row for row in by[update]}
            self.lr = by[update][0]["lr"]
            before, self.evaluate, self.budget = self.evaluate, _never, None
            try:
                self._drive(None, "")
            except _Unanswered:
                break                                # cut off here
            finally:
                self.evaluate, self.budget = before, budget
        self.lr = rate


class _Unanswered(BurnishError):
    """A question that a log has no answer to."""


def _never(*_: Any) -> float:
    raise _Unanswered("not asked yet")


def _trained(name: str, p: Tensor) -> nn.Parameter:
    if not isinstance(p, Tensor) or not p.is_floating_point() or p.is_meta:
        raise ConfigError(f"{name} is no tensor of real numbers that could be moved")
    return p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach())   # the same memory


def _scale(probe: Any) -> float:
    return float(probe.scale) if isinstance(probe, Scratch) else 0.0


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise ConfigError(f"evaluate answered with a {type(value).__name__}; expected one number, "
                          "the loss")
    return host_float(value, "evaluate")


def digest(value: Any) -> str:
    """What a batch is told by: its tensors, words and numbers, and the shape of what holds them."""
    leaves, spec = pytree.tree_flatten(value)
    h = hashlib.blake2b(str(spec).encode(), digest_size=12)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            h.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            h.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        elif isinstance(leaf, str | bytes | int | float | type(None)):
            h.update(repr(leaf).encode())
        else:
            h.update(type(leaf).__name__.encode())
    return h.hexdigest()


class Log:
    """Lines of JSON: what the run is, then one answer a line, on disk before it is used."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes() if path.exists() else b""
        except OSError as e:
            raise FormatError(f"{path} cannot be read: {e.strerror}") from None
        end = whole.rfind(b"\n") + 1                 # what follows was being written
        found = list(self._parse(whole[:end]))
        if not found:
            self.end = 0
            self.append(header)
            return
        for key, value in header.items():
            if found[0].get(key) != value:
                raise FormatError(f"{path} is of another run: its {key} is {found[0].get(key)!r}, "
                                  f"here it is {value!r}; expected a new file, or the same run")
        self.rows, self.end = found[1:], end
        wanted = {"update": int, "at": int, "scale": float, "value": float, "lr": float,
                  "batch": str}
        for i, row in enumerate(self.rows, 2):
            if bad := [k for k, kind in wanted.items() if not isinstance(row.get(k), kind)]:
                raise FormatError(f"{path}, line {i}: {bad[0]} is missing or no {wanted[bad[0]]}")

    def _parse(self, whole: bytes) -> Iterator[dict[str, Any]]:
        for i, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                raise FormatError(f"{self.path}, line {i} is no JSON: it is damaged") from None
            if not isinstance(row, dict):
                raise FormatError(f"{self.path}, line {i} is no answer: {str(row)[:40]}")
            yield row

    def append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        try:
            with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
                file.seek(self.end)
                file.truncate()                      # a line that broke off
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise BurnishError(f"an answer could not be written to {self.path} ({e.strerror}); "
                               "the weights are those before this update") from None
        self.end += len(line)
