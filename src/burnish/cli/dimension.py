"""``burnish dimension``: in how large a random subspace a task can nearly be learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from . import config
from .app import Json, app
from .screen import check_picture, emit, table


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def dimension(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="A model folder or hub name.")],
    data: Annotated[str, typer.Option(help="What burnish fit takes.")],
    output: Annotated[Path, typer.Option(help="A folder for the runs, one below it for each.")],
    least: Annotated[int, typer.Option(help="Smallest size.")] = 10,
    most: Annotated[int, typer.Option(help="Largest size.")] = 10_000,
    times: Annotated[float, typer.Option(help="A size over the one before.")] = 2.0,
    share: Annotated[float, typer.Option(help="Of the full run's score that counts.")] = 0.9,
    beyond: Annotated[int, typer.Option(help="Sizes past the first that reaches it.")] = 1,
    halvings: Annotated[int, typer.Option(help="How often the gap below it is halved.")] = 0,
    metric: Annotated[str | None, typer.Option(help="Figure on validation rows that counts; "
                                                    "default accuracy, else the loss.")] = None,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to write.")] = None,
    json: Json = False,
) -> None:
    """Sweep the size of a random subspace: burnish dimension ... [--KEY VALUE ...]

    Everything is trained once, then subspaces of rising sizes, each from the same model with the
    same settings of burnish fit (--epochs 3 --seed 1). The first that reaches the share of the full
    run's validation figure is the intrinsic dimension.
    """
    import burnish

    from ..fit import figures
    from ..formats import safe
    from ..methods.lifecycle.intrinsic_dimension import IntrinsicDimension
    from .scoring import best

    check_picture(picture)
    method = IntrinsicDimension(least=least, most=most, times=times, share=share, beyond=beyond,
                                halvings=halvings)
    settings: dict[str, Any] = {"quiet": json, **config.overrides(list(ctx.args))}

    def score(d: int | None) -> float:
        recipe, folder = ("full", "full") if d is None else (f"said(dimension={d})", f"d{d}")
        run = burnish.fit(model=model, data=data, recipe=recipe, output=output / folder, **settings)
        if "validation" not in run.metrics:
            raise ConfigError(f"{data} has no validation rows, and sizes are compared by them")
        return best(run.metrics["validation"], metric, run.facts["data"]["task"])

    found = method.lifecycle(score=score)
    told = {"dimension": found.reached, "below": found.below, "share": share, "full": found.whole,
            "bar": found.bar, "curve": found.points}
    if picture is not None:
        safe.write_text(picture, figures.dimension(found.points, found.whole, found.bar))
    rows = [(d, f"{p:.4g}", "yes" if p >= found.bar else "") for d, p in found.points]
    text = table(["size", "figure", f"{100 * share:g} % of full"],
                 [*rows, ("all", f"{found.whole:.4g}", "")], (0, 1))
    emit(json, told, f"{text}\n\n{_said(found.reached, found.below, share)}")


def _said(reached: int | None, below: int | None, share: float) -> str:
    name = f"the intrinsic dimension at {100 * share:g} %"
    if reached is None:
        return f"{name} is above {below}, the largest size tried"
    return f"{name} is {reached} or less" if below is None else \
        f"{name} is at most {reached}, and above {below}"
