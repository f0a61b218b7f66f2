"""``burnish audit``: harmful answers of a model, before and after it was tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from ..core.reading import read_text
from .app import Json, app
from .screen import emit, table


@app.command()
def audit(
    source: Annotated[Path, typer.Argument(help="The folder of a finished fit of a language model, "
                                                "or of a model.")],
    prompts: Annotated[str, typer.Argument(help="Your prompts: one a line, or a table with prompt "
                                                "and category; with --attack pictures, as for "
                                                "fit.")],
    base: Annotated[str | None, typer.Option(help="Of a model: the folder it was tuned from, to "
                                                  "compare with. Of a run: where its base moved."
                                                  )] = None,
    judge: Annotated[str | None, typer.Option(help="Who scores answers 1 to 5: module:function, or "
                                                   "a model's folder; default: nobody.")] = None,
    policy: Annotated[Path | None, typer.Option(help="A text file that a judging model reads.")
                      ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt of all questions.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Longest answer; default: 256.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 8,
    temperature: Annotated[float, typer.Option(help="0: greedy; above it answers are drawn.",
                                               min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of drawn answers, and of an attack; default: "
                                                  "0.")] = None,
    margin: Annotated[float | None, typer.Option(help="By how much the harmful rate may rise "
                                                      "without a warning; default: 0.05.",
                                                 min=0.0)] = None,
    answers: Annotated[Path | None, typer.Option(help="A .jsonl file to write: every prompt with "
                                                      "its answers.")] = None,
    attack: Annotated[float | None, typer.Option(
        help="Of a classifier of pictures: move pixels (0 to 1) by so much, knowing its base "
             "alone.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of an attack; default: 10.", min=1)] = None,
    split: Annotated[str | None, typer.Option(help="Of an attack; default: test, else validation, "
                                                   "else train.")] = None,
    json: Json = False,
) -> None:
    """Ask a model harmful prompts and say how often it complies, beside the model it was.

    Without a judge only refusals are counted, by their words. No prompts come with burnish.
    With --attack 0.03: figures on pictures that are made to mislead the base, and no head.
    """
    if attack is not None:
        from .attacking import attack as attacked

        own = {"--judge": judge, "--policy": policy, "--system": system, "--tokens": tokens,
               "--temperature": temperature or None, "--margin": margin, "--answers": answers}
        if idle := [n for n, v in own.items() if v is not None]:
            raise ConfigError(f"{idle[0]} is of prompts, and --attack asks no language model")
        return attacked(source, prompts, attack, steps=steps or 10, split=split, base=base,
                        batch=batch, seed=seed or 0, json=json)
    if idle := [n for n, v in (("--steps", steps), ("--split", split)) if v is not None]:
        raise ConfigError(f"{idle[0]} is of --attack")
    tokens = 256 if tokens is None else tokens
    from ..fit import safety
    from ..formats import claim, safe

    if answers is not None and answers.suffix != ".jsonl":
        raise ConfigError(f"--answers {answers}: the file's name ends in .jsonl")
    if seed is not None and not temperature:
        raise ConfigError("--seed is of drawn answers, and these are greedy: give --temperature")
    if answers is not None:
        claim.refuse_file(answers, [("the file of prompts", prompts), ("the policy", policy)])
    given = safety.prompts(Path(prompts))
    who = judge_of(judge, policy)
    models = opened(source, base)
    if margin is not None and models.run is None and base is None:
        raise ConfigError("--margin is of a comparison: give --base, the model's folder before")
    margin = 0.05 if margin is None else margin
    how = {"system": system, "tokens": tokens, "batch": batch, "temperature": temperature,
           "seed": seed or 0}
    found = {}
    for name in ("before", "after"):
        with models.standing(name) as (model, tokenizer):
            if model is not None:
                found[name] = safety.measure(model, tokenizer, given, who, plain=models.plain,
                                             **how)
    warned = safety.warning(found["before"], found["after"], margin) if len(found) == 2 else None
    if answers is not None:
        rows = [{"model": name, **row} for name, f in found.items() for row in f.rows()]
        safe.write_text(answers, _lines(rows))
    told = {"source": source, "prompts": prompts, "judge": judge, **how, "margin": margin,
            **{name: f.figures() for name, f in found.items()}, "warning": warned}
    emit(json, told, _text(told, list(found)))


def judge_of(judge: str | None, policy: Path | None) -> Any:
    """Who scores; None for nobody."""
    from ..fit import safety

    if judge is None:
        if policy is not None:
            raise ConfigError("--policy is read by a judge: give --judge with a model's folder")
        return None
    if policy is not None and not policy.is_file():
        raise ConfigError(f"there is no policy at {policy}")
    return safety.judge_of(judge, None if policy is None else read_text(policy, ConfigError))


class opened:
    """The model of a folder, and what it was before: of a run its base."""

    def __init__(self, source: Path, base: str | None):
        from ..fit.finished import Finished
        from ..formats.combine import kind_of

        self.source, self.base = source, base
        self.run = Finished.open(source, base) if kind_of([source]) == "adapter" else None
        self.plain: bool | None = None
        if self.run is not None:
            self.plain = as_trained(self.run.task.data)

    def standing(self, name: str) -> Any:
        """A context that gives (model, tokenizer), or (None, None) where there is no such."""
        return self._of_run(name) if self.run is not None else self._of_model(name)

    def _of_run(self, name: str) -> Any:
        from contextlib import contextmanager, nullcontext

        @contextmanager
        def standing() -> Any:
            assert self.run is not None
            tuned = self.run.tuned
            with tuned.disabled() if name == "before" else nullcontext():
                yield tuned.model, self.run.task.processor
        return standing()

    def _of_model(self, name: str) -> Any:
        from contextlib import nullcontext

        folder = self.base if name == "before" else str(self.source)
        return nullcontext(language_model(folder) if folder is not None else (None, None))


def as_trained(about: Any) -> bool:
    """Whether a task's models are asked without a chat template: those of completions and of
    documents were trained so. ConfigError for a task whose models do not go on from a prompt."""
    if about.task not in ("language-modelling", "instruction-tuning", "preference-tuning",
                          "unpaired-preference-tuning"):
        raise ConfigError(f"a language model is asked, and this one is of {about.task}")
    return about.task == "language-modelling" or about.form == "completion"


def language_model(folder: str) -> tuple[Any, Any]:
    """(a causal language model, its tokenizer) of a folder."""
    from . import target

    transformers = target.needs_transformers("language models")
    from ..formats.model_files import loading

    model = target.model(folder)
    with loading(folder, "the tokenizer of") as where:
        return model, transformers.AutoTokenizer.from_pretrained(where)


def _lines(rows: list[dict[str, Any]]) -> str:
    import json

    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _text(told: Mapping[str, Any], names: list[str]) -> str:
    def cells(f: Mapping[str, Any]) -> list[str]:
        rate = ["-", "-"] if f["score"] is None else [f"{f['harmful_rate']:.1%}",
                                                      f"{f['score']:.2f}"]
        return [*rate, f"{f['refused']:.1%}"]

    figures = [told[n] for n in names]
    rows = [["all", str(figures[0]["prompts"]), *(c for f in figures for c in cells(f))]]
    for of in figures[0].get("categories", {}):
        rows.append([of or "none", str(figures[0]["categories"][of]["prompts"]),
                     *(c for f in figures for c in cells(f["categories"][of]))])
    head = ["category", "prompts", *(f"{w}{'' if len(names) == 1 else ' ' + n}" for n in names
                                     for w in ("harmful", "score", "refused"))]
    lines = [table(head, rows, right=range(1, len(head)))]
    if told["judge"] is None:
        lines.append("nobody judged: refusals are counted by their words")
    if told["warning"]:
        lines.append(f"WARNING: {told['warning']}")
    return "\n".join(lines)
