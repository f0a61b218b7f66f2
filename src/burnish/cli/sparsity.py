"""``burnish sparsity``: how many of a model's weights can be zero, and what that suggests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .screen import check_picture, emit, table


@app.command()
def sparsity(
    model: Annotated[Path, typer.Argument(help="The folder of a tuned model.")],
    data: Annotated[str, typer.Argument(help="Held-out data, as for fit.")],
    split: Annotated[str | None, typer.Option(help="Default: validation, else the only one.")
                     ] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 16,
    metric: Annotated[str | None, typer.Option(help="A figure of evaluate; default: accuracy, "
                                                    "else loss.")] = None,
    targets: Annotated[str | None, typer.Option(help="Which weights; default the linear ones of "
                                                     "the blocks.")] = None,
    grid: Annotated[str | None, typer.Option(help="Shares to prune, such as 0.2,0.4,0.6.")] = None,
    drop: Annotated[float, typer.Option(help="Share of the figure that may be lost.")] = 0.01,
    ranking: Annotated[str, typer.Option(help="global: one ranking of all weights; layer: the "
                                              "same share of each.")] = "global",
    runs: Annotated[int, typer.Option(help="m: patterns n:m in place of shares.")] = 0,
    control: Annotated[bool, typer.Option("--control", help="Also a curve of which any go, not "
                                                            "the smallest.")] = False,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to write.")] = None,
    json: Json = False,
) -> None:
    """Prune a model's smallest weights ever further, score it, and say what it can spare.

    Nothing trains and nothing is written: afterwards the model is as it was. What may be spared
    suggests tau to sara, s to snell and ratios to pst and dsee.
    """
    from ..fit import figures
    from ..formats import safe
    from ..methods.lifecycle.essential_sparsity import EssentialSparsity
    from .scoring import Models

    check_picture(picture)
    if ranking not in ("global", "layer"):
        raise ConfigError(f"--ranking {ranking}: expected global or layer")
    asked: dict[str, Any] = {"drop": drop, "ranking": ranking, "runs": runs, "targets": targets}
    if grid is not None:
        asked["grid"] = shares(grid)
    method = EssentialSparsity(**asked)
    held = Models(model, data, split, batch)
    net = held.load(model)
    score = partial(held.score, metric=metric)
    curve = method.lifecycle(net, score=score)
    other = EssentialSparsity(**{**method.changed(), "order": "random"}).lifecycle(
        net, score=score).points if control else []
    suggested = method.suggests(curve)
    if picture is not None:
        safe.write_text(picture, figures.sparsity(curve.points, curve.essential, curve.knee, other))
    told = {"model": model, "data": data, "split": held.split, "points": curve.points,
            "essential": curve.essential, "knee": curve.knee, "size": curve.size, "drop": drop,
            "suggests": suggested, "control": other or None}
    emit(json, told, _text(method, curve, other, suggested))


def shares(text: str) -> tuple[float, ...]:
    """The shares of a list with commas.

    >>> shares("0.2, 0.4")
    (0.2, 0.4)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--grid {text}: expected shares such as 0.2,0.4,0.6") from None


def _text(method: Any, curve: Any, other: Any, suggested: list[str]) -> str:
    rows = []
    for i, (s, p) in enumerate(curve.points):
        name = f"{method.runs - i}:{method.runs}" if method.runs else f"{100 * s:.1f} %"
        marks = [w for w, at in (("essential", curve.essential), ("knee", curve.knee)) if s == at]
        rows.append([name, f"{p:.4g}", *([f"{other[i][1]:.4g}"] if other else []),
                     ", ".join(marks)])
    head = ["stay" if method.runs else "zero", "figure", *(["any go"] if other else []), ""]
    said = f"{100 * curve.essential:.3g} % of these weights can be zero at a loss of " \
           f"{100 * method.drop:g} % of the figure"
    said += "" if curve.size is None or not suggested else f": those below {curve.size:.3g}"
    return "\n".join([table(head, rows, range(1, 3 if other else 2)), "", said,
                      *(f"  try  {text}" for text in suggested)])
