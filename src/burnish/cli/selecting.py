"""``burnish select``: of many rows those that would teach what a few wanted rows ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .screen import emit, table


@app.command()
def select(
    run: Annotated[Path, typer.Argument(help="A warm-up: the folder of a run with checkpoints.")],
    data: Annotated[str, typer.Argument(help="The rows to choose from.")],
    like: Annotated[list[str], typer.Option(
        help="A few rows of what is wanted; several files are groups, any of which may be met.")],
    out: Annotated[Path | None, typer.Option(help="A .jsonl file for the chosen rows.")] = None,
    how: Annotated[str, typer.Option(help="How rows are scored, with its settings.")] = "less",
    split: Annotated[str, typer.Option(help="Of the rows to choose from.")] = "train",
    base: Annotated[str | None, typer.Option(
        help="The base model, where it has moved since the run.")] = None,
    json: Json = False,
) -> None:
    """Choose rows like wanted ones: burnish select RUN DATA --like FILE --out chosen.jsonl

    The warm-up is a run on some of the rows that keeps its checkpoints: burnish fit ...
    --save-strategy epoch --save-total-limit 4 (goracs reads any run). Then burnish fit trains the
    base on the chosen rows.
    """
    from ..core import registry
    from ..core.recipe import parse
    from ..fit.choosing import Chooser
    from ..formats import claim

    method: Any
    (method, *others) = parse(how)
    if others or not getattr(method, "chooses", False):
        known = [n for n in registry.names(extra=False)
                 if getattr(registry.find(n), "chooses", False)]
        raise ConfigError(f"--how {how}: rows are chosen by {' or '.join(known)}, with its "
                          "settings: 'less(fraction=0.1)'")
    if out is not None and (out.suffix != ".jsonl" or not out.parent.is_dir()):
        raise ConfigError(f"--out {out}: rows are written as lines of JSON, into a folder that is "
                          "there: name a file that ends in .jsonl")
    if out is not None:
        claim.refuse_file(out, [("the rows to choose from", data),
                                *(("a file of wanted rows", name) for name in like)])
    chooser = Chooser.open(run, base)
    scores = chooser.scores(method, data, like, split, _said if not json else lambda line: None,
                            written=out is not None)
    first = method.chosen(scores)
    best = [chooser.numbers[k] for k in first]
    rows = chooser.rows(best)
    if out is not None:
        chooser.write(out, best)
    told = {"rows": len(scores), "chosen": best, "scores": [round(float(scores[k]), 6)
                                                            for k in first],
            "points": len(chooser.points), "out": None if out is None else str(out)}
    emit(json, told, "\n".join(_text(rows, told, out)))


def _said(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)


def _text(rows: Iterator[str], told: dict[str, Any], out: Path | None) -> Iterator[str]:
    shown = [(i, f"{s:+.3f}", r) for i, s, r in zip(told["chosen"][:5], told["scores"], rows,
                                                    strict=False)]
    yield table(["row", "score", "the best of them"], shown, (0, 1))
    yield ""
    where = f"; they are in {out}" if out is not None else "; --out FILE.jsonl writes them"
    yield f"{len(told['chosen'])} of {told['rows']} rows are chosen{where}"
