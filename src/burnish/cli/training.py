"""``burnish fit``, ``predict``, ``evaluate`` and ``demo``: the work itself."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import BurnishError, ConfigError, nearest
from . import config, launching
from .app import Json, app
from .flags import flags
from .screen import emit, say, table

if TYPE_CHECKING:
    from ..fit.readings import AmbiguousError

#: what `burnish.fit` takes by name; everything else is a setting of training
OWN = ("model", "data", "recipe", "memory", "output")
ALSO = {"model_name_or_path": "model", "base_model": "model", "dataset": "data",
        "output_dir": "output"}


class Interrupted(BurnishError):
    """Stopped by Ctrl-C or a signal; says what is left to go on from."""

    exit_code = 130


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def fit(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Option(help="A model folder or hub name.")] = None,
    data: Annotated[list[str] | None, typer.Option(
        help="A file, a folder, a hub name or a built-in set. Several, each as NAME=WHERE, are "
             "tasks one after the other, for a recipe that trains in stages.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Such as 'lora(rank=8) + checkpoint'.")] = None,
    memory: Annotated[str | None, typer.Option(help="What you have; picks a recipe that fits.")
                      ] = None,
    output: Annotated[str | None, typer.Option(help="The folder to write.")] = None,
    launch: Annotated[int | None, typer.Option(
        help="Start so many processes that train together, by torchrun, whose command is shown; "
             "with --shard fsdp2 each holds a share of the model.")] = None,
    from_yaml: Annotated[Path | None, typer.Option(
        help="A configuration of LLaMA-Factory or axolotl; what becomes of each key is said "
             "first, and flags go over it.")] = None,
    json: Json = False,
) -> None:
    """Fine-tune: burnish fit [CONFIG] [--KEY VALUE ...]

    CONFIG is a YAML, JSON or TOML file; what follows overrides it. Any setting of the fit loop and
    of transformers' TrainingArguments may be given: --epochs 3 --learning_rate 1e-4.
    """
    import burnish

    from ..fit.readings import AmbiguousError

    words = list(ctx.args)
    if launch is not None:
        named = [("model", model), *(("data", d) for d in data or []), ("recipe", recipe),
                 ("memory", memory), ("output", output),
                 ("from-yaml", None if from_yaml is None else str(from_yaml))]
        words += [w for name, v in named if v is not None for w in (f"--{name}", v)]
        if code := launching.launch(launch, [*words, *(["--json"] if json else [])], not json):
            raise typer.Exit(code)
        return
    settings = config.read(words.pop(0)) if words and not words[0].startswith("--") else {}
    settings |= config.overrides(words)
    for old, new in ALSO.items():
        if old in settings:
            settings.setdefault(new, settings.pop(old))
    given = {"model": model, "data": tasks(data or []), "recipe": recipe, "memory": memory,
             "output": output}
    settings |= {k: v for k, v in given.items() if v is not None}
    if from_yaml is not None:
        settings = foreign(from_yaml, settings, quiet=json)
    for name in ("model", "data"):
        if name not in settings:
            raise ConfigError(f"fit needs {name}: give --{name}, or '{name}:' in the "
                              f"configuration{nearest(name, settings)}")
    own = {k: settings.pop(k) for k in OWN if k in settings}
    if json:
        settings["quiet"] = True
    try:
        try:
            run = burnish.fit(**own, **settings)
        except AmbiguousError as question:
            if json or not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise
            run = burnish.fit(**own, **(settings | ask(question)))
    except KeyboardInterrupt as stop:               # the parser would drop what it says
        raise Interrupted(str(stop) or "interrupted") from None
    if json:                                        # people were told while it ran
        emit(True, run, "")


def foreign(path: Path, said: dict[str, Any], quiet: bool = False) -> dict[str, Any]:
    """The settings of another program's configuration, with what is `said` over them."""
    from ..fit.arguments import ALIASES, OWN_ALIASES
    from ..fit.foreign import refusal, translated

    def name(key: str) -> str:
        return OWN_ALIASES.get(key, ALIASES.get(key, key))

    over = frozenset(map(name, said))
    made = translated(config.read(path), path.parent, over)
    if not quiet and int(os.environ.get("RANK", "0")) == 0:
        for line in made.lines():
            inside = "  " * line.startswith("  ")
            print(textwrap.fill(flags(line.strip()), 80, initial_indent=inside,
                                subsequent_indent=2 * inside, break_long_words=False,
                                break_on_hyphens=False))
        print()
    if why := refusal(made, path):
        raise ConfigError(why)
    return {k: v for k, v in made.settings.items() if name(k) not in over} | said


def tasks(given: list[str]) -> str | dict[str, str] | None:
    """What ``--data`` says: one place, or name -> place of several.

    >>> tasks(["photos/"]), tasks(["first=a.csv", "second=b.csv"])
    ('photos/', {'first': 'a.csv', 'second': 'b.csv'})
    """
    named: dict[str, str] = {}
    for text in given:
        name, is_named, where = text.partition("=")
        if not is_named or not name.isidentifier() or (len(given) == 1 and Path(text).exists()):
            if len(given) > 1:
                raise ConfigError(f"--data {text} has no name; several are tasks one after the "
                                  "other, written --data first=a.csv --data second=b.csv")
            return text
        if name in named:
            raise ConfigError(f"--data names {name!r} twice: {named[name]} and {where}")
        named[name] = where
    return named or None


def ask(question: AmbiguousError) -> dict[str, str]:
    """The flags of the reading that the person at the terminal chooses."""
    print(f"{question.at}: these columns can be read in more than one way")
    for n, reading in enumerate(question.readings, 1):
        print(f"  {n}  {flags(str(reading))}")
    answer = input(f"which one? [1-{len(question.readings)}, Enter stops] ").strip()
    if not answer.isdigit() or not 1 <= int(answer) <= len(question.readings):
        raise question
    return dict(question.readings[int(answer) - 1].flags)


Run = Annotated[Path, typer.Argument(help="The folder of a finished fit.")]
Base = Annotated[str | None, typer.Option(help="The base model, where it moved since.")]
Cache = Annotated[str | None, typer.Option(help="Memory in which weights with their updates may be "
                                                "kept from one answer to the next, e.g. 2GB; "
                                                "default 64MiB, 0: none.")]

Trust = Annotated[bool, typer.Option("--trust-remote-code", "--trust_remote_code",
                                     help="Let code that comes with the base run.")]


@app.command()
def predict(
    run: Run,
    inputs: Annotated[list[str], typer.Argument(help="Pictures, sounds, clouds or folders of them; "
                                                     "texts, .txt files of one a line, tables of "
                                                     "rows, rows as JSON objects.")],
    base: Base = None,
    cache: Cache = None,
    tokens: Annotated[int, typer.Option(help="Longest answer of a language model.", min=1)] = 64,
    given: Annotated[list[str] | None, typer.Option(help="A key that the recipe reads beside an "
                                                         "input, e.g. task=1; may repeat.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise that a picture is made of; "
                                                  "default: the run's.", min=0)] = None,
    guidance_scale: Annotated[float | None, typer.Option(
        "--guidance_scale", "--guidance-scale", min=0,
        help="How far a picture is led away from what is drawn without a text.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(
        "--num_inference_steps", "--num-inference-steps", min=1,
        help="Steps in which a picture is drawn.")] = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Answers of a finished run: labels, numbers, tags, stretches of a context, text, or what a
    series does next."""
    from ..fit.finished import Finished

    keys = {k: v for k, v in map(_key, given or ())}
    finished = Finished.open(run, base, trust=trust)
    how = {"seed": seed, "guidance_scale": guidance_scale,
           "num_inference_steps": num_inference_steps}
    finished.task.draws(**{k: v for k, v in how.items() if v is not None})
    with finished.cached(cache):
        answers = list(finished.predict(inputs, tokens, keys))
    lines = [f"{a['input']}: {a['said']}" for a in answers]
    emit(json, {"run": run, "answers": answers}, "\n".join(lines))


def _key(text: str) -> tuple[str, float]:
    """"task=1" -> ("task", 1), "quality=0.7" -> ("quality", 0.7)."""
    name, _, value = text.partition("=")
    if not (name.isidentifier() and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value)):
        raise ConfigError(f"--given {text}: expected key=number, e.g. task=1")
    return name, float(value) if "." in value else int(value)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[str, typer.Argument(help="As for fit.")],
    split: Annotated[str | None, typer.Option(help="Default: test, else validation, else train.")
                     ] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 16,
    text: Annotated[str | None, typer.Option(help="The text's column; default: the run's.")] = None,
    label: Annotated[str | None, typer.Option(help="The label's column; default: the run's.")
                     ] = None,
    image: Annotated[str | None, typer.Option(help="The picture's column; default: the run's.")
                     ] = None,
    audio: Annotated[str | None, typer.Option(help="The sound's column; default: the run's.")
                     ] = None,
    base: Base = None,
    cache: Cache = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """The figures of a finished run on data, beside those of its base.

    Given the data of the run itself, it takes the rows that the run held out.
    """
    from ..fit.finished import Finished

    finished = Finished.open(run, base, trust=trust)
    with finished.cached(cache):
        found = finished.evaluate(data, split, batch, text=text, label=label, image=image,
                                  audio=audio)
    rows = [(name, *(f"{v:.4f}" for v in found[name].values())) for name in ("base", "tuned")]
    emit(json, found, f"{found['rows']} rows of {data} ({found['split']}: {found['these']})\n"
         + table(("", *found["tuned"]), rows, right=range(1, 9)))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("demo-out"),
    memory: Annotated[str | None, typer.Option(help="The budget of the plan at its start.")
                      ] = None,
    json: Json = False,
) -> None:
    """A small vision transformer that knows printed characters learns handwriting.

    The model comes with the package, the 1,797 scanned digits with scikit-learn. A plan within a
    budget, then SNELLA beside a linear probe, LoRA and full fine-tuning, with every promise of
    memory checked against the truth. Then three recipes on texts, the best of them as a file that
    peft reads, and the page of burnish ui. Exit code 4 when a check does not hold.
    """
    from ..core.errors import CheckError
    from ..fit.demo import BUDGET
    from ..fit.demo import demo as run
    from .tour import Tour

    done = run(output, memory or BUDGET, quiet=json)
    tour = Tour(output, (lambda line: None) if json else say)
    tour.take()
    if json:
        emit(True, {**done.to_dict(), "tour": tour.to_dict()}, "")
    else:
        say("\n" + "\n".join(f"{'holds' if h else 'FAILS'}: {w}" for w, h in tour.checks))
    if failed := [w for w, h in tour.checks if not h]:
        raise CheckError(f"the demo ran, but this does not hold: {'; '.join(failed)}")
