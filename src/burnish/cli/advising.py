"""``burnish advise``: what to run for a model and data, and why."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from . import config
from .app import Json, app
from .memory import bar
from .screen import emit


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def advise(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A model folder or hub name.")],
    data: Annotated[str, typer.Argument(help="As for fit.")],
    memory: Annotated[str | None, typer.Option(help="What a run may take; default: what is free "
                                                    "on this machine.")] = None,
    test: Annotated[bool, typer.Option("--test", help="Try rates and sizes of batch in a few "
                                       "updates on the real rows; what that costs is said "
                                       "first.")] = False,
    json: Json = False,
) -> None:
    """A recipe, a batch and a learning rate, each with why, and the command.

    Task, classes, lengths, device and memory are read off. What cannot be told from the rows is
    said as for fit: --task, --text, --label, --image, --prompt, --completion, --split,
    --max_length, --validation.
    """
    from ..fit.advice import advise as run
    from ..fit.driving import quiet_libraries
    from ..fit.processes import sayer
    from ..fit.readings import AmbiguousError
    from ..formats.served import shell
    from ..memory.table import wrapped
    from .training import ask

    quiet_libraries()
    settings = config.overrides(list(ctx.args))
    if odd := sorted(set(settings) & {"recipe", "output", "learning_rate", "lr", "batch_size"}):
        raise ConfigError(f"--{odd[0]} is what is advised; leave it out")

    def advice(more: dict[str, Any]) -> Any:
        with bar(f"recipes for {model}") as progress:
            return run(model, data, memory, test=test, say=sayer(json), progress=progress,
                       **(settings | more))

    try:
        done = advice({})
    except AmbiguousError as question:
        if json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise
        done = advice(ask(question))
    lines = [part for line in done.lines for part in wrapped(line.replace("test=True", "--test"))]
    notes = [part for note in done.notes for part in wrapped(f"note: {note}")]
    if done.test is not None:
        notes += wrapped(f"the test took {done.test.seconds:.3g} s, {done.test.updates} updates")
    emit(json, done, "\n".join([*lines, *notes, "", *shell(done.command)]))
