"""One recipe on one task: the search for a learning rate, the seeds, and what a step takes.

A recipe is tried at the task's rate with seed 0, then at rates half a decade away while validation
gets better (both ways while all come to the same). Where few rows choose and a run takes a
blink, all rates of the task are tried, with all its seeds. The seeds are run at the best rate, and
test rows are read once each. Seeds draw the order of rows, a new head and what the method draws.
AdamW without decay, rate to zero in a line; a new head has a rate of its own, so that no method is
chosen by what its head would like.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..core.batches import cut
from ..core.errors import BurnishError
from .budgets import Share, report, share
from .records import Record
from .tasks import Task

RATIO, HEAD, WIDEST = 3.1623, 1e-2, 4
SEEDS = 5


def run(task: Task, recipe: str, budget: str = "as_is", seeds: int = SEEDS,
        say: Callable[[str], None] | None = None) -> Record:
    """Raises what :func:`burnish.tune` and the budget raise: a recipe that does not act on the
    task's model, or that no size of keeps the budget."""
    from ..fit.tasks import embedded

    embedded("image-classification", recipe)           # scores are of what is told apart
    own = share(task, recipe, budget)
    search = Search(task, own, say)
    power = search.best()
    ends = [search.end(power, seed) for seed in range(seeds)]
    found = report(task, own.recipe, own.batch)
    return Record(
        recipe, task.name, budget, own.recipe, own.limit, [e.test for e in ends],
        float(f"{search.rate(power):.4g}"),
        {f"{search.rate(p):.3g}": v for p, v in sorted(search.tried.items())},
        own.updates, own.batch, found.trainable, found.peak_bytes, measured(task, own),
        statistics.median(e.step_s for e in ends),
        {"burnish": _version(), "torch": torch.__version__, "python": platform.python_version(),
         "machine": platform.machine(), "threads": torch.get_num_threads()},
        datetime.date.today().isoformat())


class End:
    """What one training came to: shares of right answers, and processor seconds of an update."""

    def __init__(self, validation: float = 0.0, test: float = 0.0, step_s: float = 0.0):
        self.validation, self.test, self.step_s = validation, test, step_s


class Search:
    """The rates that were tried. A power is half decades from the task's rate."""

    def __init__(self, task: Task, own: Share, say: Callable[[str], None] | None):
        self.task, self.own, self.say = task, own, say
        self.tried: dict[int, float] = {}
        self.ends: dict[tuple[int, int], End] = {}

    def rate(self, power: int) -> float:
        return self.task.rate * RATIO ** power

    def end(self, power: int, seed: int) -> End:
        if (power, seed) not in self.ends:
            try:
                self.ends[power, seed] = train(self.task, self.own, self.rate(power), seed)
            except BurnishError as e:
                if "finite" not in str(e):
                    raise
                self.ends[power, seed] = End()                   # it diverged
            if self.say is not None:
                e = self.ends[power, seed]
                self.say(f"{self.own.recipe} at {self.rate(power):.3g}, seed {seed}: "
                         f"{e.validation:.4f} on validation")
        return self.ends[power, seed]

    def valid(self, power: int) -> None:
        if power not in self.tried:
            self.tried[power] = statistics.mean(
                self.end(power, seed).validation for seed in range(self.task.choosing))

    def best(self) -> int:
        """The power of the best rate."""
        for power in self.task.tried:
            self.valid(power)
        while True:
            best = max(self.tried, key=lambda p: (self.tried[p], -abs(p)))
            around = [p for p in (best - 1, best + 1) if abs(p) <= WIDEST]
            if len(set(self.tried.values())) == 1:
                # nothing moved, or everything broke: learning begins above or ends below
                around = [p for p in (max(self.tried) + 1, min(self.tried) - 1) if abs(p) <= WIDEST]
            if all(p in self.tried for p in around):
                return best
            for p in around:
                self.valid(p)


def train(task: Task, own: Share, rate: float, seed: int) -> End:
    """A model tuned from its start within its share, and its scores."""
    import burnish

    torch.manual_seed(seed)
    tuned = burnish.tune(task.fresh().train(), own.recipe,
                         calibration=task.epoch("train", seed)[:4], seed=seed, **task.how)
    if task.head:
        for n, p in tuned.model.named_parameters():
            if n.startswith(task.head):
                p.burnish_lr = HEAD / rate                       # type: ignore[attr-defined]
    optimizer = tuned.optimizer(lr=rate, weight_decay=0.0)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: max(0.0, 1 - n / own.updates))
    tuned.total_steps = own.updates
    began = time.process_time()
    for batch in batches(task, own.updates, seed):
        update(tuned, optimizer, batch, task, own.batch)
        plan.step()
    took = (time.process_time() - began) / own.updates
    return End(task.score(tuned.model, "validation"), task.score(tuned.model, "test"), took)


def batches(task: Task, updates: int, seed: int) -> Iterator[Any]:
    """As many as there are updates, epoch by epoch."""
    epoch = 0
    while True:
        for batch in task.epoch("train", 1000 * seed + epoch):
            if updates == 0:
                return
            updates -= 1
            yield batch
        epoch += 1


def update(tuned: Any, optimizer: Any, batch: Any, task: Task, samples: int) -> None:
    """One update on a batch, `samples` at once."""
    parts = pieces(batch, samples)
    if len(parts) == 1:
        tuned.step(batch, loss=task.loss)
        return
    whole = sum(n for _, n in parts)
    for part, n in parts:
        tuned.backward(part, task.loss, scale=n / whole)
    optimizer.step()
    optimizer.zero_grad()


def pieces(batch: Any, samples: int) -> list[tuple[Any, int]]:
    """(rows, how many) of a batch, `samples` each."""
    from ..core.batches import tensors

    count = next(tensors(batch)).shape[0]
    return [(cut(batch, end, start), end - start) for start in range(0, count, samples)
            for end in (min(start + samples, count),)]


def measured(task: Task, own: Share) -> int:
    """Bytes of a step on the first batch."""
    import burnish

    torch.manual_seed(0)
    tuned = burnish.tune(task.fresh().train(), own.recipe,
                         calibration=task.epoch("train", 0)[:4], **task.how)
    tuned.optimizer(lr=task.rate)
    return burnish.measure(tuned, task.first(own.batch), loss=task.loss).peak_bytes


def _version() -> str:
    import burnish

    return burnish.__version__
