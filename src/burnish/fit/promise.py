"""Memory before and after: a recipe chosen for it, the promise, and words for when it is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import BurnishError, MemoryExceeded, NoPlanError
from ..core.reading import plain
from ..core.recipe import parse
from ..memory import MemoryReport, format_bytes
from . import checkpoint
from .arguments import Options
from .processes import world

#: words by which frameworks say that there is no more memory
_FULL = ("out of memory", "can't allocate memory", "not enough memory")


def held_out(recipe: Any, task: Any, size: int, plain: bool) -> Any:
    """The longest batch of validation rows, as large as a micro-batch, where a part of the recipe
    looks at those while it trains; else None, and where there are none."""
    if task.data.validation is None or not any(part.holds_out for part in parse(recipe)):
        return None
    return task.call(task.example(min(size, len(task.rows("validation"))), "validation"), plain)[0]


@contextlib.contextmanager
def as_trained(module: nn.Module, args: Mapping[str, Any]) -> Iterator[None]:
    """The model as the trainer runs it: it keeps keys and values only where `args` ask for them."""
    config = getattr(module, "config", None)
    was = getattr(config, "use_cache", None)
    if not was:
        yield
        return
    config.use_cache = bool(args.get("use_cache", False))
    try:
        yield
    finally:
        config.use_cache = was


def stores(recipe: Any) -> bool:
    """Does a part of the recipe, or may one of a recipe yet to be chosen, hold the base in a form
    of its own? Then weights are read one by one, straight into that form."""
    return recipe is None or any("storage" in part.axes() for part in parse(recipe))


def choose(module: nn.Module, memory: Any, batch: Any, loss: Any, own: Options, say: Any,
           accumulation: int = 1) -> Any:
    """The best plan within `memory`. Raises NoPlanError with what is missing.

    accumulation: batches of an update.
    """
    from ..memory import plan

    plans = plan(module, memory=memory, batch=batch, targets=own.targets, head=own.head,
                 device=device(), loss=loss, accumulation=accumulation, **world(own))
    if plans.best is None:
        near = plans.cheapest
        tail = f"; {near.recipe} comes closest and needs {format_bytes(near.needs)}" if near else ""
        raise NoPlanError(f"no recipe fits {format_bytes(plans.budget)}{tail}")
    best = plans.best
    more = f", {best.accumulate} batches of {best.batch} per update" if best.accumulate > 1 else ""
    say(f"plan: {best.recipe} fits {format_bytes(plans.budget)} with "
        f"{format_bytes(best.peak_bytes)}{more} ({len(plans.fits)} recipes fit)")
    return best


def promised(module: nn.Module, recipe: Any, memory: Any, batch: Any, loss: Any, own: Options,
             say: Any, tasks: Mapping[str, Any] | None = None, accumulation: int = 1,
             held: Any = None) -> MemoryReport | None:
    """The memory the recipe will take. Raises NoPlanError where that is more than `memory`.

    tasks: name -> batch, of data sets one after the other; the dearest stage decides.
    accumulation: batches of an update. held: the longest batch of validation rows.
    """
    from ..memory import parse_bytes, simulate
    from ..memory.simulate import SimulationError

    limit = parse_bytes(memory) if memory is not None else None
    try:
        promise = simulate(module, recipe, batch, targets=own.targets, head=own.head,
                           device=device(), loss=loss, tasks=tasks or 0,
                           accumulation=accumulation, held=held, **world(own))
    except SimulationError as e:
        if limit is not None:
            raise
        say(f"note: no promise of memory, {e}")
        return None
    of = f" of stage {promise.stage}, the dearest," if promise.stage else ""
    if promise.world_size > 1:
        of += f" in each of {promise.world_size} processes"
    more = f", {accumulation} to an update," if accumulation > 1 else ""
    say(f"promise: a training step{of} of batch {promise.batch}{more} peaks at "
        f"{format_bytes(promise.peak_bytes)}\n  {_parts(promise)}")
    if limit is not None and promise.peak_bytes > limit:
        advice = "give a smaller batch_size=, or add checkpoint or nf4 to the recipe" if tasks \
            else "leave recipe= out to have one chosen that fits"
        raise NoPlanError(f"{recipe} needs {format_bytes(promise.peak_bytes)}, more than the "
                          f"{format_bytes(limit)} asked for; {advice}")
    return promise


def memory_line(memory: dict[str, Any]) -> str:
    """"memory: 12.1 MiB promised, 12.2 MiB measured (+0.8 %); the process grew by 31 MiB", and the
    moments beside the step, a line each."""
    said = []
    if memory.get("simulated"):
        said.append(f"{format_bytes(memory['simulated']['peak_bytes'])} promised")
    if memory.get("measured"):
        text = f"{format_bytes(memory['measured']['peak_bytes'])} measured"
        if memory.get("difference") is not None:
            text += f" ({100 * memory['difference']:+.1f} %)"
        said.append(text)
    others = [f"  {m:<8}  {format_bytes(f['promised']):>9}"
              + (f"  {format_bytes(f['measured']):>9} measured" if f["measured"] else "")
              for m, f in memory.get("moments", {}).items() if m != "train" and f["promised"]]
    grew = memory.get("process_peak", 0) - memory.get("process_before", 0)
    tail = f"; the process grew by {format_bytes(grew)}" if grew > 0 else ""
    also = "\n".join(["\npromised beside the step:", *others]) if others else ""
    return (f"memory: {', '.join(said)}{tail}" if said else f"memory{tail}") + also


@contextlib.contextmanager
def out_of_memory(output: Path) -> Iterator[None]:
    """Whatever says "no memory" becomes one error, with what is left of the run."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        full = isinstance(e, MemoryError) or any(w in str(e).lower() for w in _FULL)
        if isinstance(e, BurnishError) or not full:
            raise
        found = checkpoint.all_in(output)
        left = f"go on from {found[-1]} with resume=True and" if found else "start again with"
        raise MemoryExceeded(f"the run ran out of memory: {str(e).splitlines()[0]}; {left} a "
                             "smaller batch_size (and more gradient_accumulation_steps), or "
                             "memory='...' to have a recipe chosen") from e


@contextlib.contextmanager
def workers_told(output: Path) -> Iterator[None]:
    """What goes wrong in a process that reads rows, in one line: its own error, or its death."""
    try:
        yield
    except BurnishError as e:
        text = str(e).strip()
        if "DataLoader worker" not in text:
            raise
        raise type(e)(text.splitlines()[-1].partition(": ")[2] or text) from None
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        left = " and resume=True" if checkpoint.all_in(output) else ""
        raise BurnishError(f"a process that reads rows died ({plain(e, 160)}), perhaps for want "
                           f"of memory; go on with fewer workers= (0 reads in this process){left}"
                           ) from None


def _parts(report: MemoryReport) -> str:
    return ", ".join(f"{k} {format_bytes(v)}" for k, v in report.by_category.items() if v)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
