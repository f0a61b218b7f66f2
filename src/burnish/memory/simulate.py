"""The real training step of a recipe, run on tensors that have no bytes.

`simulate` builds (or copies) the model with fake parameters, joins the recipe to it with
:func:`burnish.tune` and drives ``tuned.step`` twice: the second step has optimizer state. The
ledger that watches is the one `measure` puts on the real run, so promise and truth are the same
reading of two runs of one body.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from ..blocks.state.tap_cache import assumed_there
from ..blocks.weight.hosted import standing_in
from ..core.batches import call, inputs
from ..core.draw import random_kept
from ..core.dtypes import dtype_of
from ..core.errors import BurnishError, ConfigError, nearest
from ..core.keys import examples, keys_of
from ..core.recipe import Recipe, parse
from ..core.stage import label as name_of
from ..core.unread import is_unread
from .devices import kernels_of
from .during import MOMENTS, joined, look, watch_originals
from .extend import Shallows, extended
from .fakes import blank_batch, fake_copy, fakes_move, from_config, unread_again
from .ledger import Ledger
from .operators import leaves
from .report import MemoryReport
from .shortcuts import (
    collector_waits,
    quick_distances,
    quick_noise,
    quick_runs,
    quick_strips,
    quiet,
    shapes_aside,
    tables_forgotten,
    values_are_known,
    whole_bunches,
)
from .snapshot import Snapshot
from .stream import Stream
from .updates import ALIKE, check_accumulation, each_of, passes_of, update
from .values import FOLLOWED, FakeLedger, no_modes
from .world import World, standing


class SimulationError(BurnishError):
    """The step depends on values that only a real run has, or fails as a real one would."""


def simulate(model: Any, recipe: Any = None, batch: Any = 1, dtype: torch.dtype | str | None = None,
             targets: Any = None, head: bool | str = "auto", lr: float = 1e-3, steps: int = 2,
             device: str = "cpu", loss: Callable[[Any, Any], Tensor] | None = None,
             count: bool = False, evaluate: bool = False,
             tasks: int | Mapping[str, Any] = 0, cached: int | str | None = None,
             whole: bool = False, shallows: Shallows | None = None, during: str = "train",
             world_size: int = 1, shard: str | None = None, shard_offload: bool = False,
             taps_read: bool = False, accumulation: int = 1, held: Any = None) -> MemoryReport:
    """What a training step of `recipe` takes on `device`, without running it.

    model: a module (its data is never touched; it may be on meta) or a transformers config, which
        stands for its first architecture.
    recipe: as for :func:`burnish.tune`; None is full fine-tuning.
    batch: samples, (samples, tokens), or a mapping / tuple of tensors as ``tuned.step`` takes; of
        tensors the shapes matter, and the values of integer ones where the model asks. Where it is
        a number, keys that the recipe's parts read (task ids) are made as well. Of several
        processes, what each of them sees.
    dtype: of the model's and the batch's floating tensors; None keeps them as they are.
    device: where the step would run. Without that device here its kernels cannot be faked: the
        CPU's stand in and the report says so in a note.
    steps: steps driven; from the second on optimizer state is there.
    loss: as for ``tuned.step``; in evaluation what is made of the model's answer.
    count: also count floating-point operations and bytes moved.
    during: the moment looked at (during.py): "train", a step; "load", joining the recipe to the
        model as it was loaded, or opened (:func:`burnish.open_model`); "evaluate", the forward
        alone, in evaluation mode and without gradients; "save"; "merge". What an optimizer holds
        meanwhile comes on top of the last three.
    evaluate: the same as ``during="evaluate"``.
    cached: bytes that evaluation may keep of what it makes, as for ``tuned.cached``; None: as a
        model has it where nobody says.
    tasks: data sets that a recipe in stages is trained on, one after the other: how many, or name
        -> batch. Of several stages the dearest is told; ``stages`` of the report has all peaks.
    whole: run every block. Otherwise a run of equal blocks is simulated at three depths, which
        prove what any other depth gives (extend.py); where they do not, and in several processes
        (buckets and prefetched blocks do not begin again with each block), it is run whole as well.
    shallows: the copies with fewer blocks, for whoever simulates a model many times.
    world_size: processes that train together; the report is of one of them. Their collectives are
        run by groups that move nothing (world.py).
    shard: how the model stands in them: "ddp" (the default of several), whole in each, with its
        gradients in buckets; "fsdp2", as :func:`burnish.shard` spreads it.
    shard_offload: the shares wait on the host.
    taps_read: the states that a side network keeps in a folder (``lst(cache=...)``) are there and
        are read, as from the second epoch on; else they are computed and written, which takes more.
    accumulation: batches of an update; from the second on the gradients of those before are there.
        What is counted is one batch and the update.
    held: the longest batch of validation rows, for parts that look at those while they train
        (``stn``); default one like the step's own.

    Raises ConfigError for a batch the model does not fit, SimulationError where the step depends
    on values; everything :func:`burnish.tune` raises.
    """
    dtype = dtype_of(dtype)
    if during not in MOMENTS:
        raise ConfigError(f"during={during!r}: expected one of {', '.join(MOMENTS)}"
                          f"{nearest(during, MOMENTS)}")
    during = "evaluate" if evaluate else during
    check_accumulation(accumulation)
    world = World.of(world_size, shard, shard_offload)
    if world.shard == "fsdp2" and during not in ("train", "evaluate"):
        raise ConfigError(f"during={during!r} is not simulated for shares: every process loads the "
                          "whole model first, writes an adapter as one process does, and a merge "
                          "needs the whole model; leave shard out")
    parts = parse("full" if recipe is None else recipe)   # imports methods outside the fake mode
    if taps_read and not any(getattr(p, "cache", None) for p in parts):
        raise ConfigError(f"taps_read=True: no part of {parts} keeps states in a folder; expected "
                          "a side network with cache=..., such as lst(cache='taps')")
    if not isinstance(model, nn.Module):
        model = from_config(model, dtype)
    batches = dict(tasks) if isinstance(tasks, Mapping) else {
        f"task{n + 1}": batch for n in range(tasks)}
    settings = dict(dtype=dtype, targets=targets, head=head, lr=lr, steps=steps, device=device,
                    loss=loss, count=count, during=during, cached=cached, world=world,
                    unread=during == "load" and is_unread(model), taps_read=taps_read,
                    accumulation=min(accumulation, ALIKE), held=held)
    whole = whole or world.size > 1
    if not whole:
        shallows = shallows or Shallows(model)
    reports: list[MemoryReport] = []
    names: list[str] = []
    while not reports or len(reports) < len(names):       # each stage on a model of its own
        def run(model: nn.Module, **words: Any) -> Stream:
            nonlocal names
            stream, names = _simulated(model, parts, batch, batches, len(reports), **settings,
                                       **words)
            return stream

        report = extended(shallows, parts, targets, run) if shallows and not whole else None
        reports.append(report or MemoryReport.read(run(model)))
    dearest = max(reports, key=lambda r: r.peak_bytes)
    dearest.accumulation = accumulation
    if len(reports) > 1:
        dearest.stage = names[reports.index(dearest)]
        dearest.stages = {n: r.peak_bytes for n, r in zip(names, reports, strict=True)}
    return dearest


def _simulated(model: nn.Module, parts: Recipe, batch: Any, tasks: Mapping[str, Any], stage: int, *,
               dtype: torch.dtype | None, targets: Any, head: bool | str, lr: float, steps: int,
               device: str, loss: Any, count: bool, during: str, cached: int | str | None,
               world: World, unread: bool, taps_read: bool, accumulation: int,
               held: Any = None, order: Callable[[list[str]], list[int]] | None = None, **words: Any
               ) -> tuple[Stream, list[str]]:
    """(one stage of the recipe, or its only stretch; what the stages are called)."""
    from ..engine.room import size
    from ..engine.stages import begin, stages_of
    from ..engine.tune import tune
    from ..engine.tuned import DEFAULT

    mode = FakeTensorMode(allow_non_fake_inputs=True)     # tables that blocks hold are real
    kind = torch.device(device).type
    ledger = FakeLedger(kind=kind, count=count)
    ledger.mode = mode
    here = device if kind == "cpu" or _usable(kind) else "cpu"
    ledger.offloads = world.offload and here != device
    with (collector_waits(), world.started(here) as mesh, random_kept(), values_are_known(),
          assumed_there() if taps_read else contextlib.nullcontext(),
          fakes_move(), shapes_aside(), tables_forgotten(), quick_noise(ledger),
          quick_strips(ledger), quick_runs(ledger), quick_distances(ledger), quiet(),
          whole_bunches(order) if order is not None else contextlib.nullcontext(),
          kernels_of(kind if here == "cpu" else "cpu"), standing_in(here != device)):
        twin = fake_copy(model, mode, here, dtype)
        try:
            with mode:
                def faked(name: str | None) -> tuple[Any, str]:
                    return _batch(twin, tasks.get(name, batch) if name is not None else batch,
                                  ledger, here, dtype, parts)

                first = next(iter(tasks), None)
                example, label = faked(first)

                def join() -> Any:
                    tuned = tune(twin, parts, targets=targets, head=head, calibration=[example],
                                 name=first or DEFAULT)
                    world.spread(tuned, mesh)
                    return tuned

                ledger.model = twin
                if unread:
                    unread_again(twin)
                tuned = joined(join, ledger) if during == "load" else join()
                stages = stages_of(tuned, list(tasks))
                for s in stages[: stage + 1]:
                    if s.data not in (None, first):
                        example, label = faked(s.data)
                    begin(tuned, s, calibration=[example])
                said = stages[stage].optimizer if stages else {}
                tuned.optimizer(**{"lr": lr, **said}, **each_of(accumulation))
                ledger.model = tuned.model
                if cached is not None:
                    tuned.state.room.limit = size(cached)
                if taps_read:                     # what blocks return is seen before the ledger
                    with torch.no_grad():
                        call(tuned.model, example)
                if during == "train":
                    stream = _drive(tuned, ledger, example, loss or _stand_in(tuned), steps, here,
                                    kind, accumulation, begin=lambda: world.wrap(tuned),
                                    held=None if held is None else
                                    _batch(twin, held, ledger, here, dtype, parts)[0], **words)
                else:
                    look(during, tuned, ledger, example, loss)
                    stream = Stream.of(ledger, device=torch.device(here).type, label=kind,
                                       recipe=str(tuned.recipe), **words)
        except (DataDependentOutputException, DynamicOutputShapeException,
                UnsupportedOperatorException) as error:
            raise SimulationError(
                f"{type(model).__name__} with {parts} cannot be simulated: {error.func} needs "
                "values that only a real step has; burnish.measure runs one") from error
        except RuntimeError as error:         # a real step would fail at the same operator
            reason = str(error).strip().splitlines()[0]
            raise SimulationError(f"a step of {type(model).__name__} with {parts} fails: "
                                  f"{reason}") from error
    notes = list(stream.facts["notes"])
    if here != device:
        notes.append(f"no {kind} here: counted with the CPU's kernels, but for those that "
                     f"memory/devices.py declares for {kind}; the device's context comes on top")
    told = stream.with_facts(batch=label, notes=notes, world_size=world.size, shard=world.shard)
    return told, [name_of(stages, n) for n in range(len(stages))]


def measure(tuned: Any, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None,
            steps: int = 2, restore: bool = True, count: bool = False,
            through: nn.Module | None = None, accumulation: int = 1, held: Any = None
            ) -> MemoryReport:
    """The same ledger on the real step: ``tuned.step(batch, loss)``, `steps` times.

    Of several processes each has to ask, and is told what it takes itself.

    restore: put trained tensors, buffers, optimizer state and random state back as they were
        (gradients are cleared); the copies kept for that are not part of the reading.
    through: what is called in the model's place (DistributedDataParallel around it).
    accumulation: batches of an update. Two are run; all of them where a step inside backward waits
        for the last.
    held: as for :func:`simulate`.
    """
    keep = Snapshot(tuned) if restore else contextlib.nullcontext()
    before, tuned.steps.through = tuned.steps.through, through or tuned.steps.through
    try:
        with keep, shapes_aside():
            ledger = Ledger(tuned.model, count=count)
            report = MemoryReport.read(_drive(tuned, ledger, batch, loss, steps, None,
                                              accumulation=accumulation, held=held))
            report.world_size, report.shard = standing(tuned)
    finally:
        tuned.steps.through = before
    report.source, report.accumulation = "measured", accumulation
    report.batch = _label(batch)
    return report


def _drive(tuned: Any, ledger: Ledger, batch: Any, loss: Any, steps: int,
           device: str | None, label: str | None = None, accumulation: int = 1,
           begin: Callable[[], None] = lambda: None, held: Any = None, **words: Any) -> Stream:
    if tuned.current_optimizer is not None:
        ledger.watch("optimizer", [list(tuned.current_optimizer.state.values())])
    ledger.watch("activations", batch if isinstance(batch, Mapping) else [batch])
    since = 0
    with ledger:
        watch_originals(tuned, ledger)
        made = len(ledger.entries)
        begin()
        for entry in ledger.entries[made:]:   # as what stood there before
            entry.category = "weights"
        if tuned.current_optimizer is None:
            tuned.optimizer(**each_of(accumulation))
        passes = passes_of(tuned, accumulation)
        for step in range(steps):
            tuned.timeline.emit("rehearse", step)
            for _, handler in tuned.timeline.handlers if held is not None else ():
                if hasattr(handler, "looks_at"):
                    handler.looks_at(held, loss)
            if step == steps - 1:
                since = ledger.now + 1
            update(tuned, batch, loss, passes if step == steps - 1 else 1, ledger.reset_counts)
    where = device or next(p.device.type for p in tuned.model.parameters())
    counts = {"trainable": sum(p.numel() for p in tuned.parameters()),
              "adapter_bytes": sum(t.numel() * t.element_size() for t in tuned.tensors().values())}
    return Stream.of(ledger, since=since, device=torch.device(where).type, label=label,
                     recipe=str(tuned.recipe), counts=counts, notes=tuned.active.notes, **words)


def _stand_in(tuned: Any) -> Callable[[Any, Any], Tensor] | None:
    """A loss for models that give none: the mean of the first floating output."""
    def loss(outputs: Any, batch: Any) -> Tensor:
        value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(
            outputs, "loss", None)
        if value is None:
            value = outputs if isinstance(outputs, Tensor) else next(
                (t for t in leaves(_plain(outputs)) if t.is_floating_point()), None)
        if value is None:
            raise ConfigError(f"the model's answer, {type(outputs).__name__}, has no .loss and no "
                              "tensor to stand in for one; say what is made of it with "
                              "loss=lambda outputs, batch: ...")
        return value if value.dim() == 0 else value.float().mean()

    return loss


def _plain(outputs: Any) -> Any:
    return outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs


# -- the batch ----------------------------------------------------------------------------------
def _batch(model: nn.Module, batch: Any, ledger: FakeLedger, device: str,
           dtype: torch.dtype | None, parts: Recipe) -> tuple[Any, str]:
    if isinstance(batch, int) or (isinstance(batch, tuple) and all(
            isinstance(n, int) for n in batch)):
        label = str(batch) if isinstance(batch, int) else " x ".join(map(str, batch))
        with no_modes():
            samples = batch if isinstance(batch, int) else batch[0]
            batch = blank_batch(model, batch, dtype) | examples(parts, samples)
    else:
        label = _label(batch)
    _accepted(model, batch, set(keys_of(parts)))
    return _fake(batch, ledger, device, dtype), label


def _accepted(model: nn.Module, batch: Any, declared: set[str]) -> None:
    known, batch = inspect.signature(model.forward).parameters, inputs(batch)
    if isinstance(batch, Mapping) and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for name in batch:
            if name not in known and name not in declared:
                raise ConfigError(f"{type(model).__name__} takes no {name!r}{nearest(name, known)} "
                                  f"(it takes {', '.join(known)})")


def _fake(value: Any, ledger: FakeLedger, device: str, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        fake = torch.empty(value.shape, dtype=kind, device=device)
        known = not isinstance(value, FakeTensor) and value.device.type != "meta"
        if known and value.numel() <= FOLLOWED and not value.is_floating_point():
            with no_modes():
                ledger.knows(fake, value.detach().to("cpu", copy=True))
        return fake
    if isinstance(value, Mapping):
        return {k: _fake(v, ledger, device, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_fake(v, ledger, device, dtype) for v in value)
    return value


def _label(batch: Any) -> str:
    first = next(leaves(batch), None)
    if first is None:
        return ""
    return " x ".join(str(n) for n in (first.shape[:2] if first.dim() == 2 else first.shape[:1]))


def _usable(kind: str) -> bool:
    """Can tensors of this device type be faked here? That needs the device's own runtime."""
    try:
        return torch.get_device_module(kind).is_available()
    except RuntimeError:
        return False


