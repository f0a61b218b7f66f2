"""``burnish soup`` and ``arithmetic``: several tuned folders made into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .files import Output
from .screen import emit

Rank = Annotated[int | None, typer.Option(
    help="Of the adapter that comes out; default: the sum of theirs, which loses nothing.", min=1)]


@app.command()
def soup(
    folders: Annotated[list[Path], typer.Argument(help="Model folders, or adapter folders, tuned "
                                                       "from one start.")],
    output: Output,
    greedy: Annotated[bool, typer.Option("--greedy", help="Keep what does not hurt on --data."
                                         )] = False,
    learned: Annotated[bool, typer.Option("--learned", help="Learn the weights on --data; model "
                                          "folders that classify.")] = False,
    data: Annotated[str | None, typer.Option(help="Held-out data, as for fit; never the test "
                                                  "set.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: validation, else the only one.")
                     ] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 16,
    metric: Annotated[str | None, typer.Option(help="A figure of evaluate; default: accuracy, "
                                                    "else loss.")] = None,
    rank: Rank = None,
    json: Json = False,
) -> None:
    """Average tuned models (model soups): all of them, those that help, or by learned weights.

    Weights are read and written one tensor at a time. Adapters (lora) are averaged as updates, by
    stacking their factors: the sum of their ranks is the rank of the soup, or --rank.
    """
    from ..methods.lifecycle.soup import greedy as choose

    if greedy and learned:
        raise ConfigError("--greedy and --learned are two kinds of soup; give one")
    if data is None and (greedy or learned):
        raise ConfigError("--greedy and --learned need --data, held-out rows")
    if data is not None and not (greedy or learned):
        raise ConfigError("--data is for --greedy or --learned")
    if len(folders) < 2:
        raise ConfigError("a soup is made of two folders or more")
    kind = _ready(folders, output, rank)

    def write(some: Sequence[int], new: Path, weights: Sequence[float] | None = None) -> None:
        w = weights or [1 / len(some)] * len(some)
        _write(kind, [folders[i] for i in some], w, new, rank)

    told: dict[str, Any] = {}
    chosen, weights = list(range(len(folders))), None
    if data is not None and greedy:
        from .scoring import scorer

        score = scorer(kind, folders, data, split, batch, metric)
        chosen, best = choose(len(folders), _written(write, score, output))
        told = {"chosen": [str(folders[i]) for i in chosen], "score": best}
    elif data is not None:
        from .scoring import learn

        if kind == "adapter":
            raise ConfigError("--learned takes model folders; make them with `burnish merge`")
        weights = learn(folders, data, split, batch)
        told = {"weights": {str(f): w for f, w in zip(folders, weights, strict=True)}}
    finish(kind, folders, output, lambda new: write(chosen, new, weights))
    said = f", of {len(chosen)} of {len(folders)} folders (held-out score {told['score']:.4g})" \
        if greedy else ""
    emit(json, {"output": output, "kind": kind, **told}, f"soup written to {output}{said}")


@app.command(context_settings={"ignore_unknown_options": True})
def arithmetic(
    expression: Annotated[list[str], typer.Argument(help="BASE + 0.5*A - B, as words or one text. "
                                                         "Of adapters: 0.5*A - B, or with BASE.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    rank: Rank = None,
    json: Json = False,
) -> None:
    """Add and subtract what tuning changed (task arithmetic): base + weight * (tuned - base) + ...

    The first model is the base; of the others the difference from it counts, so that
    "base + 0.4*math - 0.2*toxic" learns one task and forgets another, and "base + a" is a. Heads
    and vocabularies of other sizes stay the base's, and are named. Adapters (lora) are differences
    already: the result is one adapter. One tensor is in memory at a time.
    """
    from ..formats import combine

    first, *rest = terms(" ".join(expression))
    base = None if combine.kind_of([first[1]]) == "adapter" else first[1]
    summed = rest if base is not None else [first, *rest]
    if base is not None and first[0] != 1:
        raise ConfigError(f"{base} is the base, which everything is added to; it has no weight")
    if not summed:
        raise ConfigError(f"nothing is added to {base}: write BASE + 0.5*TUNED")
    folders, weights = [f for _, f in summed], [w for w, _ in summed]
    kind = _ready(folders, output, rank, base)
    left: dict[str, str] = {}

    def write(new: Path) -> None:
        if base is not None and kind == "model":
            left.update(combine.add_models(base, folders, weights, new))
        else:
            combine.sum_adapters(folders, weights, new, rank, base)

    finish(kind, [*folders, *([base] if base else [])], output, write)
    lines = [f"written to {output}", *(f"  {n} stays the base's: {why}" for n, why in left.items())]
    emit(json, {"output": output, "kind": kind, "base": base, "left": left,
                "terms": [{"weight": w, "folder": f} for w, f in summed]}, "\n".join(lines))


_TERM = re.compile(r"(?:(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*\*\s*)?([^\s*]+)$", re.I)


def terms(text: str) -> list[tuple[float, Path]]:
    """(weight, folder) of a sum: signs stand alone, weights before a star.

    >>> [(w, str(f)) for w, f in terms("base + 0.5*runs/a - b")]
    [(1.0, 'base'), (0.5, 'runs/a'), (-1.0, 'b')]
    """
    words = re.sub(r"\s*\*\s*", "*", text).split()
    out, sign = [], 1.0
    if words[:1] == ["-"]:
        sign, words = -1.0, words[1:]
    for i, word in enumerate(words):
        if i % 2:
            if word not in ("+", "-"):
                raise ConfigError(f"{text!r}: expected + or - before {word!r}; signs stand alone, "
                                  "as in: base + 0.5*a - b")
            sign = 1.0 if word == "+" else -1.0
            continue
        found = _TERM.match(word)
        if found is None or word in ("+", "-"):
            raise ConfigError(f"{text!r}: {word!r} is no folder; write base + 0.5*a - b")
        out.append((sign * float(found[1] or 1), Path(found[2])))
    if len(words) % 2 == 0:
        raise ConfigError(f"{text!r} ends with a sign; write base + 0.5*a - b" if words else
                          "nothing to add: write base + 0.5*a - b")
    return out


def _ready(folders: Sequence[Path], output: Path, rank: int | None, base: Path | None = None
           ) -> str:
    """What the folders are, once nothing stands against writing the output."""
    from ..formats import claim, combine, staged

    kind = combine.kind_of(folders)
    if rank is not None and kind == "model":
        raise ConfigError("--rank is of adapters, and these are whole models")
    reads = [("an input", f) for f in folders] + ([("the base model", base)] if base else [])
    claim.refuse_overlap(output, reads, whole=True)
    staged.refuse_others(output, kind)
    return kind


def _write(kind: str, folders: Sequence[Path], weights: Sequence[float], new: Path,
           rank: int | None) -> None:
    from ..formats import combine

    if kind == "adapter":
        combine.sum_adapters(folders, weights, new, rank)
    else:
        combine.sum_models(folders, weights, new)


def finish(kind: str, reads: Sequence[Path], output: Path, write: Callable[[Path], Any]) -> None:
    from ..formats import claim, staged

    inputs = [("an input", f) for f in reads]
    claim.refuse_overlap(output, inputs, whole=True)
    with staged.replace(output, kind, inputs) as new:
        write(new)


def _written(write: Callable[[Sequence[int], Path], None], score: Callable[[Path], float],
             output: Path) -> Callable[[tuple[int, ...]], float]:
    """The score of a mean, as it would be written."""
    return lambda some: scored_beside(output, lambda new: write(some, new), score)


def scored_beside(output: Path, write: Callable[[Path], Any], score: Callable[[Path], float]
                  ) -> float:
    """The score of a folder that is written beside the output, and gone again."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".burnish-") as new:
        write(Path(new))
        return score(Path(new))
