"""``burnish mix``: which shares of several data sets to train on, foretold from small runs."""

from __future__ import annotations

import json as lines
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, DataError
from .app import Json, app
from .screen import emit


@app.command()
def mix(
    model: Annotated[str, typer.Argument(help="The model that is to be tuned.")],
    data: Annotated[list[Path], typer.Argument(help="The data sets, .jsonl files of the same "
                                                    "columns.")],
    held: Annotated[Path, typer.Option(help="A .jsonl file of rows that mixtures are judged by; "
                                            "never the test set.")],
    recipe: Annotated[str, typer.Option(help="Of the small runs.")] = "lora(rank=8)",
    count: Annotated[int, typer.Option(help="Rows of a small run.", min=1)] = 200,
    how: Annotated[str, typer.Option(help="The method, with its settings.")] = "damo",
    epochs: Annotated[int, typer.Option(help="Passes of a small run.", min=1)] = 1,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the small runs.")] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 16,
    metric: Annotated[str | None, typer.Option(help="A figure of evaluate; default: the task's "
                                                    "own.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .jsonl file for rows by the chosen mixture."
                                             )] = None,
    rows: Annotated[int | None, typer.Option(help="So many of them; default: as many as there "
                                                  "are.", min=1)] = None,
    json: Json = False,
) -> None:
    """Foretell a mixture: burnish mix MODEL a.jsonl b.jsonl --held held.jsonl --out mixed.jsonl

    Small runs on rows drawn by several shares are judged by a figure on held-out rows; a surface
    over the shares is fitted to them, and the mixture that it foretells to be best is tried too
    (DaMo). Then burnish fit trains the model on the rows that were written.
    """
    from ..formats import claim

    part = _part(how)
    if out is not None:
        if out.suffix != ".jsonl" or not out.parent.is_dir():
            raise ConfigError(f"--out {out}: rows are written as lines of JSON, into a folder that "
                              "is there: name a file that ends in .jsonl")
        claim.refuse_file(out, [("the data", f) for f in (*data, held)])
    elif rows is not None:
        raise ConfigError("--rows does nothing without --out")
    sets = _sets(data)
    asked = read(held)
    tries = [0]

    def train(some: list[str]) -> Path:
        from .. import fit

        folder = Path(beside, f"run{tries[0]}")
        tries[0] += 1
        file = Path(beside, "rows.jsonl")
        file.write_text("\n".join(some) + "\n", "utf-8")
        more: dict[str, Any] = {} if lr is None else {"lr": lr}
        fit(model, str(file), recipe, output=folder, validation=0, epochs=epochs, batch_size=batch,
            quiet=True, report=False, measure=False, save_strategy="no", **more)
        return folder

    def score(folder: Path, _: Sequence[str]) -> float:
        from .scoring import scorer

        return scorer("adapter", [folder], str(held), None, batch, metric)(folder)

    with TemporaryDirectory(prefix="burnish-mix-") as beside:
        found = part.lifecycle(sets, train, score, held=asked, count=count)
    written = None
    if out is not None:
        from ..formats import safe

        written = rows or sum(map(len, sets.values()))
        safe.write_text(out, "\n".join(part.rows(sets, written, found.chosen)) + "\n")
    told = {"how": str(part), "tried": [{"shares": w, "figure": y} for w, y in found.tried],
            "foretold": {"shares": found.shares, "figure": found.foretold,
                         "measured": found.measured, "error": found.surface.error},
            "chosen": found.chosen, "out": out, "rows": written}
    chosen = ", ".join(f"{n} {w:.1%}" for n, w in found.chosen.items())
    emit(json, told, f"{found}\n\nchosen: {chosen}" + (
        f"; {written} rows written to {out}" if written else "; --out writes rows of it"))


def _part(text: str) -> Any:
    from ..core.recipe import parse

    parts = list(parse(text))
    if len(parts) != 1 or parts[0].name != "damo":
        raise ConfigError(f"--how {text}: data are mixed by damo, with its settings: "
                          "'damo(trials=8)'")
    return parts[0]


def _sets(files: Sequence[Path]) -> dict[str, list[str]]:
    """The rows of each, by the file's name."""
    names = [f.stem for f in files]
    if len(files) < 2 or len(set(names)) < len(names):
        raise ConfigError("two data sets or more are mixed, files of different names; got "
                          f"{', '.join(map(str, files))}")
    return {f.stem: read(f) for f in files}


def read(file: Path) -> list[str]:
    """A file's lines, each a row in JSON with its keys in order, so that equal rows are equal."""
    if file.suffix != ".jsonl" or not file.is_file():
        raise DataError(f"{file}: expected a .jsonl file that is there")
    out = []
    for i, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = lines.loads(line)
        except ValueError as e:
            raise DataError(f"{file}, line {i}: no JSON") from e
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {i}: expected an object with a row's columns")
        out.append(lines.dumps(row, sort_keys=True, ensure_ascii=False))
    if not out:
        raise DataError(f"{file} has no rows")
    return out
