"""``burnish simulate``, ``plan`` and ``compare``: what a step costs, before anything is loaded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, NoPlanError
from . import target
from .app import Json, app
from .screen import emit, table

Model = Annotated[str, typer.Argument(help="A model folder, a config as JSON or a hub name; the "
                                           "weights are not needed.")]
Batch = Annotated[int, typer.Option(help="Samples in a batch.", min=1)]
Length = Annotated[int | None, typer.Option(help="Tokens per sample.", min=1)]
Dtype = Annotated[str | None, typer.Option(help="The model's dtype, such as bf16.")]
Targets = Annotated[str | None, typer.Option(help="Which weights; default every linear outside "
                                                  "the head.")]
Device = Annotated[str, typer.Option(help="The kind of device to count for: cpu or cuda.")]
Tasks = Annotated[int, typer.Option(help="Data sets that a recipe in stages is trained on, one "
                                         "after the other; the dearest stage is told.", min=0)]
World = Annotated[int, typer.Option(help="Processes that train together; batch and memory are of "
                                         "one of them.")]
Shard = Annotated[str | None, typer.Option(help="How the model stands in several processes: ddp "
                                                "(default), whole in each, or fsdp2, in shares.")]
Offload = Annotated[bool, typer.Option(help="The shares of fsdp2 wait on the host.")]
Accumulation = Annotated[int, typer.Option(help="Batches of an update: from the second on the "
                                               "gradients of those before are there.", min=1)]


def _batch(batch: int, length: int | None) -> Any:
    return batch if length is None else (batch, length)


@app.command()
def simulate(
    model: Model,
    recipe: Annotated[str | None, typer.Option(help="Default: full fine-tuning.")] = None,
    batch: Batch = 1,
    length: Length = None,
    dtype: Dtype = None,
    targets: Targets = None,
    device: Device = "cpu",
    tasks: Tasks = 0,
    world_size: World = 1,
    shard: Shard = None,
    shard_offload: Offload = False,
    accumulation: Accumulation = 1,
    picture: Annotated[Path | None, typer.Option(help="Draw the step into this PNG, SVG or "
                                                      "PDF.")] = None,
    moments: Annotated[bool, typer.Option(help="Also the peaks of loading, evaluating, saving and "
                                               "merging.")] = False,
    json: Json = False,
) -> None:
    """The peak memory of a training step, by category and module, without running it."""
    import burnish

    from ..memory.moments import peaks
    from ..memory.rates import rates
    from ..memory.table import wrapped
    from ..memory.units import format_bytes

    config, size = target.config(model), _batch(batch, length)
    settings: dict[str, Any] = dict(
        dtype=dtype, targets=targets, device=device, tasks=tasks,
        world_size=world_size, shard=shard, shard_offload=shard_offload)
    report = burnish.simulate(config, recipe, size, count=True, accumulation=accumulation,
                              **settings)
    if picture is not None:
        report.picture(picture)
    speed = rates(device)
    low, high = speed.seconds(report, accumulation)
    facts = report.to_dict() | {"step_seconds": [low, high], "rates": speed.to_dict()}
    lines = [str(report), *wrapped(f"  a step takes {low:.3g} to {high:.3g} s ({speed.source})")]
    if moments:
        facts["moments"] = {m: r.peak_bytes
                            for m, r in peaks(config, recipe, size, **settings).items()}
        lines += ["", "  the peak of every moment", *(
            f"  {m:<8}  {format_bytes(b):>10}" for m, b in facts["moments"].items())]
    emit(json, facts, "\n".join(lines))


@app.command()
def plan(
    model: Model,
    memory: Annotated[str | None, typer.Option(help="What you have, such as 8GB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The card you have, such as 'RTX 4090': memory, "
                                                 "device and speed.")] = None,
    batch: Batch = 8,
    length: Length = None,
    prefer: Annotated[str | None, typer.Option(help="What to favour: quality, speed, memory or "
                                                    "size.")] = None,
    dtype: Dtype = None,
    targets: Targets = None,
    device: Annotated[str | None, typer.Option(help="The kind of device to count for: cpu (the "
                                                    "default) or cuda.")] = None,
    data: Annotated[Path | None, typer.Option(help="The training data, whose rows are counted: "
                                                   "the hours it takes.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of the training data, in place of "
                                                  "--data.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the training data, in place of "
                                                    "--rows; needs --length.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How often the data is seen; default "
                                                      "once.")] = None,
    limits: Annotated[bool, typer.Option("--limits", help="Also the largest batch and the "
                                         "longest sequence of the first recipe.")] = False,
    smaller: Annotated[bool, typer.Option("--smaller", help="Also what to give up first to fit "
                                          "the next smaller card.")] = False,
    fit_card: Annotated[str | None, typer.Option("--smaller-card", help="The same, for this "
                                                 "card.")] = None,
    world_size: World = 1,
    shard: Shard = None,
    shard_offload: Offload = False,
    cache: Annotated[bool, typer.Option(help="Keep reports on disk, and use those that are "
                                             "there.")] = True,
    json: Json = False,
) -> None:
    """Ranked recipes that fit the memory you have. Exit code 3 when none does."""
    import burnish

    if memory is None and gpu is None:
        raise ConfigError("say what you have: --memory 8GB, or --gpu 'RTX 4090'")
    if data is not None:
        if rows is not None or tokens is not None:
            raise ConfigError("--data counts the rows; leave --rows and --tokens out")
        rows = _rows(data)
    with bar(f"recipes for {model} within {memory or gpu}") as progress:
        plans = burnish.plan(target.config(model), memory=memory, batch=_batch(batch, length),
                             gpu=gpu, rows=rows, tokens=tokens, epochs=epochs, limits=limits,
                             smaller=fit_card or smaller, prefer=prefer, dtype=dtype,
                             targets=targets, device=device, world_size=world_size,
                             shard=shard, shard_offload=shard_offload, cache=cache,
                             progress=progress)
    emit(json, plans, str(plans))
    if not len(plans):
        raise NoPlanError(f"no recipe fits {memory or gpu} for {model}")


def _rows(data: Path) -> int:
    """Rows of the training split, as `fit` reads it; what it sets aside for validation is no part
    of an epoch."""
    from ..fit.data import read

    return len(read(str(data)).train)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on the terminal while it lasts, there before the libraries are loaded; nothing where
    there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    width = 30

    def show(done: int, total: int) -> None:
        full = width * done // max(total, 1)
        sys.stderr.write(f"\r[{'#' * full}{' ' * (width - full)}] {done} of {total} recipes\x1b[K")
        sys.stderr.flush()

    sys.stderr.write(f"\r[{' ' * width}] {what}")
    sys.stderr.flush()
    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


@app.command()
def compare(
    model: Model,
    recipes: Annotated[list[str], typer.Argument(help="Two or more recipes.")],
    batch: Batch = 1,
    length: Length = None,
    dtype: Dtype = None,
    targets: Targets = None,
    device: Device = "cpu",
    tasks: Tasks = 0,
    world_size: World = 1,
    shard: Shard = None,
    shard_offload: Offload = False,
    accumulation: Accumulation = 1,
    json: Json = False,
) -> None:
    """The cost of several recipes for the same model and batch, side by side."""
    import burnish

    config = target.config(model)
    reports = [burnish.simulate(config, recipe, _batch(batch, length), dtype=dtype,
                                targets=targets, device=device, tasks=tasks,
                                world_size=world_size, shard=shard, shard_offload=shard_offload,
                                accumulation=accumulation)
               for recipe in recipes]
    emit(json, {"model": model, "reports": reports}, _side_by_side(reports))


def _side_by_side(reports: list[Any]) -> str:
    from ..memory import format_bytes

    kinds = list(reports[0].by_category)
    rows = [(r.recipe, f"{r.trainable:,}", format_bytes(r.adapter_bytes),
             format_bytes(r.peak_bytes), *(format_bytes(r.by_category[k]) for k in kinds))
            for r in reports]
    head = ("recipe", "trainable", "adapter", "peak", *kinds)
    return table(head, rows, right=range(1, len(head)))
