"""``burnish bench``: recipes on the same tasks under the same budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Json, app
from .screen import check_picture, emit


@app.command()
def bench(
    recipes: Annotated[list[str] | None, typer.Argument(
        help="One or more, e.g. 'lora(rank=8)'. None: what the folder holds is shown.")] = None,
    output: Annotated[Path, typer.Option(
        help="A folder of runs, a JSON document each; what it holds is not run again.")
    ] = Path("board"),
    task: Annotated[list[str] | None, typer.Option(
        help="handwriting, text, cells, patients, bytes or tones; may be given several times. "
             "Default all.")] = None,
    budget: Annotated[list[str] | None, typer.Option(
        help="as_is, parameters, peak or time; may be given several times. Default as_is.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs at the best rate.")] = 5,
    page: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    picture: Annotated[Path | None, typer.Option(
        help="An SVG file: score over peak, of the first budget.")] = None,
    json: Json = False,
) -> None:
    """Try recipes on six small transfers that every machine can run, and compare them.

    Each is run at the learning rate that is best on validation rows. A budget makes something
    equal: as many trained numbers, bytes of a step or processor seconds as lora(rank=8) takes.
    A folder of runs can be added to by others: a file each.
    """
    import sys

    import torch

    from ..board import BUDGETS, TASKS, Records
    from ..board import page as shown
    from ..board.page import frontier, points
    from ..core.errors import BurnishError, ConfigError, nearest
    from ..core.recipe import parse
    from ..fit import figures
    from ..formats import safe

    check_picture(picture)
    if page is not None:
        safe.check_writable(page)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; expected a folder of runs")
    budgets = list(dict.fromkeys(budget or ["as_is"]))
    for b in budgets:
        if b not in BUDGETS:
            raise ConfigError(f"--budget {b}: expected one of {', '.join(BUDGETS)}"
                              f"{nearest(b, BUDGETS)}")
    tasks = list(dict.fromkeys(task or TASKS))
    for t in tasks:
        if t not in TASKS:
            raise ConfigError(f"--task {t}: expected one of {', '.join(TASKS)}{nearest(t, TASKS)}")
    wanted = [str(r) for r in recipes or []]
    for r in wanted:
        parse(r)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if wanted:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)              # processor seconds of one thread
        try:
            _fill(output, wanted, tasks, budgets, seeds, say)
        finally:
            torch.set_num_threads(threads)
    records = Records.read(output)
    if not any(r.scores for r in records):
        why = next((r.refused for r in records), "")
        raise BurnishError(f"no run in {output} has scores" + (f": {why}" if why else
                           "; name recipes to run"))
    text = shown(records)
    if page is not None:
        safe.write_text(page, text)
    if picture is not None:
        first = [r for r in records if r.budget == budgets[0]]
        safe.write_text(picture, figures.board(points(first), frontier(first)))
    emit(json, {"runs": [r.to_dict() for r in records]}, text)


def _fill(output: Path, recipes: list[str], tasks: list[str], budgets: list[str], seeds: int,
          say: Any) -> None:
    """The runs that the folder lacks."""
    import datetime
    import warnings

    from ..board import Record, Records, run
    from ..board import task as made
    from ..core.errors import BurnishError, ConfigError

    for name in tasks:
        own = None
        for budget in budgets:
            for recipe in recipes:
                there = Records.read(output).get(recipe, name, budget)
                if there is not None and (there.refused or len(there.scores) >= seeds):
                    continue
                try:
                    own = own or made(name)
                except ConfigError as e:
                    say(f"{name}: {e}")       # a package is not here; the other tasks go on
                    break
                say(f"{name}, {budget}: {recipe}")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        found = run(own, recipe, budget, seeds, lambda line: say(f"  {line}"))
                    except BurnishError as e:
                        say(f"  refused: {e}")
                        found = Record(recipe, name, budget, refused=str(e),
                                       date=datetime.date.today().isoformat())
                Records.write(output, found)
