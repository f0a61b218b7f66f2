"""``burnish continual``: tasks one after the other, and what is left of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Json, app
from .screen import emit


@app.command()
def continual(
    recipes: Annotated[list[str], typer.Argument(help="One or more, e.g. 'lora(rank=4)'.")],
    stream: Annotated[str, typer.Option(help="digits, text or tables.")] = "digits",
    scenario: Annotated[str | None, typer.Option(
        help="class, task (rows say theirs) or domain; default the stream's own.")] = None,
    learner: Annotated[list[str] | None, typer.Option(
        help="A way to learn a stream, e.g. 'lae(ema=0.99)'; may be given several times. Default "
             "all there are.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each, in orders of their own.")] = 1,
    baselines: Annotated[bool, typer.Option(
        help="Joint, sequential, replay and a linear probe beside them.")] = True,
    epochs: Annotated[int | None, typer.Option(help="Of each task.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate of what a recipe adds.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    json: Json = False,
) -> None:
    """Learn tasks one after the other: accuracy after each, forgetting, transfer, what is stored.

    Settings are the stream's own for every row. To choose others, choose them on another stream:
    burnish.continual.search refuses to be judged where it has looked.
    """
    import sys
    import warnings

    from ..continual import learner as known
    from ..continual import report
    from ..continual.real import named
    from ..fit.driving import quiet_libraries
    from ..formats import safe

    if page is not None:
        safe.check_writable(page)                    # before minutes are spent
    quiet_libraries()
    made = named(stream, scenario)                   # type: ignore[arg-type]
    changed: dict[str, Any] = {k: v for k, v in (("epochs", epochs), ("rate", rate))
                               if v is not None}
    training = replace(made(0).training, **changed) if changed else None
    hows = [n for n in known.names() if n not in report.BASELINES] if learner is None else learner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = report.compare(made, recipes, learners=hows, seeds=seeds, baselines=baselines,
                              training=training,
                              say=lambda line: print(line, file=sys.stderr, flush=True))
    if page is not None:
        safe.write_text(page, done.page())
    emit(json, done, str(done))
