"""``burnish search``: which recipe of a space is best, by figure and by memory."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import BurnishError, ConfigError
from . import config
from .app import Json, app
from .screen import check_picture, emit, table


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def search(
    ctx: typer.Context,
    space: Annotated[str, typer.Argument(help="A recipe with choices, e.g. 'lora(rank=4|8|16)'; 0 "
                                              "leaves the part out.")],
    model: Annotated[str, typer.Option(help="A model folder or hub name.")],
    data: Annotated[str, typer.Option(help="What burnish fit takes, with rows to validate on.")],
    output: Annotated[Path, typer.Option(help="A folder for the search and its runs; a search that "
                                              "is there goes on.")],
    trials: Annotated[int, typer.Option(help="Recipes to try, those before counted.")] = 20,
    layers: Annotated[int, typer.Option(help="Blocks of the model, each of which a recipe may "
                                             "leave alone; 0: none is a choice.")] = 0,
    memory: Annotated[str | None, typer.Option(help="Recipes that need more are not run.")] = None,
    objectives: Annotated[str, typer.Option(
        help="Some of figure, peak, trained, seconds, with commas.")] = "figure,peak",
    metric: Annotated[str | None, typer.Option(help="The figure; default the task's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search; runs have --run-seed.")] = 0,
    picture: Annotated[Path | None, typer.Option(help="An SVG file of the front.")] = None,
    json: Json = False,
) -> None:
    """Try recipes of a space: burnish search SPACE ... [--KEY VALUE ...]

    Each trial is a run of burnish fit with the settings given (--epochs 1 --batch-size 16), chosen
    by what the trials before it came to. It ends in the recipes that no other beats, and what to
    type for the best of them. Needs the extra search.
    """
    import sys

    from ..fit import figures
    from ..formats import safe
    from ..formats.served import shell
    from ..memory import format_bytes, parse_bytes
    from ..search import Space, Trial
    from ..search import search as go

    check_picture(picture)
    check_layers(model, layers)
    made = Space.of(space, layers)
    settings = config.overrides(list(ctx.args))
    if "recipe" in settings:
        raise ConfigError("--recipe is what is searched: it is the first word")
    wanted = tuple(o.strip() for o in objectives.split(",") if o.strip())
    runner = Runner(model, data, output, None if memory is None else parse_bytes(memory), metric,
                    settings)

    def say(trial: Trial) -> None:
        told = trial.failed if trial.score is None else \
            f"{trial.score.figure:.4g}, {format_bytes(trial.score.peak)}"
        print(f"{trial.number + 1:>3} of {trials}  {trial.recipe or '-'}: {told}", file=sys.stderr,
              flush=True)

    front = go(made, runner, output, trials=trials, seed=seed, objectives=wanted, say=say)
    best = front.best
    if not best:
        first = next((t for t in front.trials if t.failed), None)
        raise BurnishError(f"no trial of {len(front.trials)} has come to a figure"
                           + (f"; the first: {first.recipe}: {first.failed}" if first else ""))
    if picture is not None:
        safe.write_text(picture, figures.front(
            [(t.score.peak, t.score.figure) for t in front.trials if t.score is not None],
            [(t.score.peak, t.score.figure, t.recipe or "") for t in best if t.score is not None]))
    rows = [(t.recipe, f"{t.score.figure:.4g}", format_bytes(t.score.peak), f"{t.score.trained:,}",
             f"{t.score.seconds:.0f} s") for t in best if t.score is not None]
    text = table(["recipe", "figure", "peak", "trained", "time"], rows, (1, 2, 3, 4))
    command = shlex.join(["burnish", "fit", "--model", str(model), "--data", str(data),
                          "--recipe", str(best[0].recipe)])
    emit(json, {**front.to_dict(), "command": command},
         f"{text}\n\n{len(front.trials)} trials; no recipe tried beats these in "
         f"{' and '.join(wanted)}\nthen:\n" + "\n".join(shell(command)))


def check_layers(model: str, layers: int) -> None:
    """Raises ConfigError where the model's configuration says another number of blocks."""
    import json

    try:
        told = json.loads((Path(model) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return
    known = {told[k] for k in ("num_hidden_layers", "n_layer", "n_layers") if k in told} \
        if isinstance(told, dict) else set()
    if layers and known and layers not in known:
        raise ConfigError(f"--layers {layers}: {model} has {known.pop()} blocks")


class Runner:
    """A recipe -> what a run of it came to; one that needs more than there is does not run."""

    def __init__(self, model: str, data: str, output: Path, memory: int | None, metric: str | None,
                 settings: dict[str, Any]):
        self.model, self.data, self.output = model, data, output
        self.memory, self.metric = memory, metric
        self.settings = {"report": False, "test": False, **settings, "quiet": True}
        if "run_seed" in self.settings:
            self.settings["seed"] = self.settings.pop("run_seed")

    def __call__(self, recipe: str, number: int) -> Any:
        import time

        import burnish

        from ..search import Score
        from .scoring import best

        folder, start = self.output / f"trial-{number + 1}", time.perf_counter()
        run = burnish.fit(model=self.model, data=self.data, recipe=recipe, output=folder,
                          resume=folder.exists(),    # of a search that was stopped inside it
                          **({} if self.memory is None else {"memory": self.memory}),
                          **self.settings)
        if "validation" not in run.metrics:
            raise ConfigError(f"{self.data} has no validation rows, and recipes are compared by "
                              "them")
        if run.promise is None:
            raise BurnishError("no promise of memory could be made")
        trained = sum(p.numel() for p in run.tuned.parameters() if p.requires_grad)
        figure = best(run.metrics["validation"], self.metric, run.facts["data"]["task"])
        return Score(figure, run.promise.peak_bytes, trained, time.perf_counter() - start)
