"""``burnish steer``: a manner as one vector, out of pairs of answers."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .files import Output
from .screen import emit, table


@app.command()
def steer(
    model: Annotated[str, typer.Argument(help="A language model's folder or name on the hub.")],
    pairs: Annotated[str, typer.Argument(help="Rows of prompt, chosen (much of the trait) and "
                                              "rejected (little of it).")],
    output: Output,
    layer: Annotated[int | None, typer.Option(help="Block, from 0; default: the middle one.")
                     ] = None,
    alphas: Annotated[str, typer.Option(help="Strengths to try on held-out pairs.")] = "0.5,1,2,4",
    cap: Annotated[float, typer.Option(help="By what factor perplexity may grow.")] = 1.1,
    against: Annotated[list[str] | None, typer.Option(
        help="Pairs of another trait, whose direction is taken out; may repeat.")] = None,
    batch: Annotated[int, typer.Option(help="Pairs at once.", min=1)] = 8,
    json: Json = False,
) -> None:
    """A steering vector as an adapter: nothing trains, d numbers are written.

    v is the mean state behind a block over answers with much of a trait, less that over answers
    with little; a tenth of the pairs says which strength is taken. `burnish merge` folds it into a
    bias.
    """
    from ..fit.finished import quiet
    from ..fit.steer import steer as made
    from ..formats import claim, staged

    try:
        strengths = [float(a) for a in alphas.split(",")]
    except ValueError:
        raise ConfigError(f"--alphas {alphas}: expected numbers, e.g. 0.5,1,2") from None
    quiet()
    inputs = [("the model", model), *(("the pairs", a) for a in (pairs, *(against or ())))]
    claim.refuse_overlap(output, inputs, whole=True)
    staged.refuse_others(output, "adapter")
    found = made(model, pairs, layer=layer, alphas=strengths, cap=cap, against=against or (),
                 batch=batch)

    found.tuned.save(output, run=found.facts())
    found.task.processor.save_pretrained(output)
    rows = [(f"{t['alpha']:g}", f"{t['alignment']:+.4f}", f"{t['gain']:+.4f}",
             f"{t['perplexity']:.4g}", f"{t['cost']:.3f}") for t in found.tried]
    emit(json, {"output": output, "recipe": str(found.tuned.recipe), "best": found.best,
                "norm": float(found.vector.norm()), "tried": found.tried},
         table(("strength", "alignment", "gain", "perplexity", "cost"), rows, right=range(5))
         + f"\nadapter written to {output} ({found.tuned.recipe})")
