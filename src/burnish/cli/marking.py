"""``burnish mark``: rows whose answers lean on the text they were given, told by an indicator."""

from __future__ import annotations

import json as json_
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .screen import emit, table


@app.command()
def mark(
    source: Annotated[Path, typer.Argument(help="The seed: a finished fit of a language model on "
                                                "some of the rows, or a tuned model's folder.")],
    data: Annotated[str, typer.Argument(help="Rows of instructions, as for fit.")],
    out: Annotated[Path, typer.Option(help="A .jsonl file for the rows.")],
    how: Annotated[str, typer.Option(help="conditional(beta=0.6, indicator='...', layer=12).")
                   ] = "conditional",
    split: Annotated[str, typer.Option(help="Of the data.")] = "train",
    base: Annotated[str | None, typer.Option(help="Of a run: where its base moved.")] = None,
    json: Json = False,
) -> None:
    """Conditional instruction tuning: burnish mark SEED DATA --out marked.jsonl

    Each answer has a score from 0 to 1, how much of the seed's attention lay on the user's words.
    Above beta the indicator goes behind them. Then burnish fit trains the base on the marked rows,
    and the indicator is written where an answer has to come out of a text.
    """
    from ..core.recipe import parse
    from ..fit import marking
    from ..fit.data import read
    from ..fit.words import longest
    from ..formats import claim, safe
    from .auditing import opened

    part: Any
    (part, *others) = parse(how)
    if others or part.name != "conditional":
        raise ConfigError(f"--how {how}: conditional with its settings is expected, such as "
                          "'conditional(beta=0.5)'")
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: rows are written as lines of JSON, into a folder that is "
                          "there: name a file that ends in .jsonl")
    claim.refuse_file(out, [("the data", data)])
    found = read(data, task="instruction-tuning", validation=0)
    if split not in found.splits:
        raise ConfigError(f"{data} has no split {split!r}; it has {', '.join(found.splits)}")
    rows = list(found.splits[split])
    with opened(source, base).standing("after") as (model, tokenizer):
        made, scores = marking.mark(model, tokenizer, rows, part, found.where[split],
                                    longest(model, None, None)[0])
    safe.write_text(out, "".join(json_.dumps(r, ensure_ascii=False) + "\n" for r in made))
    every = sorted(s for row in scores for s in row)
    marked = sum(s > part.beta for s in every)
    told = {"out": out, "rows": len(rows), "answers": len(every), "marked": marked,
            "beta": part.beta, "indicator": part.indicator, "scores": scores}
    emit(json, told, _text(every, marked, part.beta, out))


def _text(every: Sequence[float], marked: int, beta: float, out: Path) -> str:
    at = [(f"{int(q * 100)} %", f"{every[min(len(every) - 1, int(q * len(every)))]:.3f}")
          for q in (0.1, 0.25, 0.5, 0.75, 0.9)]
    return "\n".join([
        table(("answers below", "score"), at, right=(0, 1)), "",
        f"{marked} of {len(every)} answers lean on their context (score above {beta:g}); rows are "
        f"in {out}"])
