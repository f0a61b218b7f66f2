"""``burnish fit``, ``predict``, ``evaluate`` and ``demo``: the work itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, nearest
from . import config
from .app import Json, app
from .screen import emit

#: what `burnish.fit` takes by name; everything else is a setting of training
OWN = ("model", "data", "recipe", "memory", "output")
ALSO = {"model_name_or_path": "model", "base_model": "model", "dataset": "data",
        "output_dir": "output"}


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def fit(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Option(help="A model folder or hub name.")] = None,
    data: Annotated[str | None, typer.Option(help="A file, a folder, a hub name or a built-in "
                                                  "set.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Such as 'lora(rank=8) + checkpoint'.")] = None,
    memory: Annotated[str | None, typer.Option(help="What you have; picks a recipe that fits.")
                      ] = None,
    output: Annotated[str | None, typer.Option(help="The folder to write.")] = None,
    json: Json = False,
) -> None:
    """Fine-tune: burnish fit [CONFIG] [--KEY VALUE ...]

    CONFIG is a YAML, JSON or TOML file; what follows overrides it. Any setting of the fit loop and
    of transformers' TrainingArguments may be given: --epochs 3 --learning_rate 1e-4.
    """
    import burnish

    words = list(ctx.args)
    settings = config.read(words.pop(0)) if words and not words[0].startswith("--") else {}
    settings |= config.overrides(words)
    for old, new in ALSO.items():
        if old in settings:
            settings.setdefault(new, settings.pop(old))
    given = {"model": model, "data": data, "recipe": recipe, "memory": memory, "output": output}
    settings |= {k: v for k, v in given.items() if v is not None}
    for name in ("model", "data"):
        if name not in settings:
            raise ConfigError(f"fit needs {name}: give --{name}, or '{name}:' in the "
                              f"configuration{nearest(name, settings)}")
    own = {k: settings.pop(k) for k in OWN if k in settings}
    run = burnish.fit(**own, **({"quiet": True} if json else {}), **settings)
    emit(json, run, str(run))
