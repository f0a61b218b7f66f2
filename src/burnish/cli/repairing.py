"""``burnish repair``: a tuned language model, with less of what makes it comply with harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, nearest
from .app import Json, app
from .files import Output
from .screen import emit

WAYS = ("antidote", "recovery")


@app.command()
def repair(
    source: Annotated[Path, typer.Argument(help="The folder of a finished fit of a language model, "
                                                "or of a tuned model.")],
    prompts: Annotated[Path, typer.Argument(help="Harmful prompts of yours: one a line, or a table "
                                                 "with prompt.")],
    output: Output,
    how: Annotated[str, typer.Option(help="antidote(ratio=0.1): entries that these prompts use "
                                          "most are zero. recovery: weights are --base's again."
                                          )] = "antidote",
    base: Annotated[str | None, typer.Option(help="Of recovery: the aligned model's folder. Of a "
                                                  "run: where its base moved.")] = None,
    benign: Annotated[Path | None, typer.Option(help="Of recovery: prompts of the task, as the "
                                                     "harmful ones.")] = None,
    data: Annotated[str | None, typer.Option(help="Of recovery: held-out rows of the task, as for "
                                                  "fit, that say what it may lose.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: validation, else the only one.")
                     ] = None,
    metric: Annotated[str | None, typer.Option(help="A figure of evaluate; default: the task's."
                                               )] = None,
    judge: Annotated[str | None, typer.Option(help="Of recovery: who scores answers 1 to 5, as for "
                                                   "audit; default: words of refusal.")] = None,
    policy: Annotated[Path | None, typer.Option(help="A text file that a judging model reads.")
                      ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of recovery: longest answer that is looked "
                                                    "at; default: 64.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 8,
    json: Json = False,
) -> None:
    """Antidote or recovering alignment on a run or a model; `burnish audit` says what it was worth.

    antidote takes a run whose recipe has lora's factors, or a model folder; recovery a model folder
    (`burnish merge` makes one) and the folder it was tuned from.
    """
    from ..fit import safety
    from ..formats import claim, staged
    from ..formats.combine import kind_of

    part, kind = _part(how), kind_of([source])
    given = {"--benign": benign, "--data": data, "--split": split, "--metric": metric,
             "--judge": judge, "--policy": policy, "--tokens": tokens}
    if part.name == "antidote" and (idle := [n for n, v in given.items() if v is not None]):
        raise ConfigError(f"{idle[0]} is of recovery; antidote reads the harmful prompts alone")
    harmful = safety.prompts(prompts)
    reads = [source, *([Path(base)] if base is not None else [])]
    claim.refuse_overlap(output, [("an input", f) for f in reads], whole=True)
    staged.refuse_others(output, kind)                   # before anything is loaded
    if part.name == "antidote":
        told = _antidote(part, source, base, kind, [p.text for p in harmful], batch, output, reads)
    else:
        if kind != "model" or base is None or benign is None or data is None:
            raise ConfigError("recovery takes a whole model (burnish merge makes one), --base, the "
                              "aligned model it was tuned from, --benign, prompts of the task, and "
                              "--data, held-out rows of it")
        told = _recovery(part, _Asked(source, base, harmful, safety.prompts(benign), data, split,
                                      metric, judge, policy, tokens or 64, batch), output, reads)
    emit(json, {"output": output, "how": str(part), "kind": kind, **told}, "\n".join(
        [f"{kind} written to {output} ({part})", *_said(told)]))


def _part(text: str) -> Any:
    from ..core.recipe import parse

    parts = list(parse(text))
    if len(parts) != 1 or parts[0].name not in WAYS:
        raise ConfigError(f"--how {text}: expected one of {', '.join(WAYS)}{nearest(text, WAYS)}")
    return parts[0]


def _batches(model: Any, tokenizer: Any, texts: Sequence[str], plain: bool | None, batch: int
             ) -> list[dict[str, Any]]:
    from ..fit.safety import asked, check_causal
    from ..fit.words import check_room

    check_causal(model)
    found = [asked(tokenizer, texts[i : i + batch], plain=plain)
             for i in range(0, len(texts), batch)]
    for given in found:
        check_room(model, given["input_ids"].shape[1], 0)
    return found


def _antidote(part: Any, source: Path, base: str | None, kind: str, texts: Sequence[str],
              batch: int, output: Path, reads: Sequence[Path]) -> dict[str, Any]:
    from ..formats.combine import facts_of_task
    from ..formats.model_files import copy_processor
    from .auditing import opened
    from .mixing import finish

    if kind == "model" and base is not None:
        raise ConfigError(f"antidote needs no other model, and {source} is a whole one: leave "
                          "--base out")
    models = opened(source, base)
    with models.standing("after") as (model, tokenizer):
        tuned = model if models.run is None else models.run.tuned
        shares = part.lifecycle(tuned, _batches(model, tokenizer, texts, models.plain, batch))

        def write(new: Path) -> None:
            if models.run is None:
                model.save_pretrained(new)
            else:
                facts = {**(facts_of_task(source) or {}), "recipe": str(tuned.recipe),
                         "made_of": [str(source)]}
                tuned.save(new, run=facts)
            copy_processor([source], new)

        finish(kind, reads, output, write)
    return {"zeroed": shares}


@dataclass
class _Asked:
    source: Path
    base: str
    harmful: Sequence[Any]
    benign: Sequence[Any]
    data: str
    split: str | None
    metric: str | None
    judge: str | None
    policy: Path | None
    tokens: int
    batch: int


def _recovery(part: Any, of: _Asked, output: Path, reads: Sequence[Path]) -> dict[str, Any]:
    from ..fit import safety
    from ..formats.model_files import copy_processor
    from .auditing import as_trained, judge_of, language_model
    from .mixing import finish
    from .scoring import Models

    who = judge_of(of.judge, of.policy)
    held = Models(of.source, of.data, of.split, of.batch)
    plain = as_trained(held.task.data)
    model, tokenizer = held.load(of.source), held.task.processor
    aligned = {n: p.detach() for n, p in language_model(of.base)[0].named_parameters()}

    def harm(net: Any) -> float:
        found = safety.measure(net, tokenizer, of.harmful, who, plain=plain, tokens=of.tokens,
                               batch=of.batch)
        return 1 - found.refused if found.rate is None else found.rate

    sets = [_batches(model, tokenizer, [p.text for p in some], plain, of.batch)
            for some in (of.harmful, of.benign)]
    found = part.lifecycle(model, aligned, *sets, harm=harm,
                           score=lambda net: held.score(net, of.metric))

    def write(new: Path) -> None:
        model.save_pretrained(new)
        copy_processor([of.source], new)

    finish("model", reads, output, write)
    return {"step": found.step, "rollback": found.rollback, "restored": found.share,
            "score": found.score, "harm": found.harm,
            "trace": [dict(zip(("step", "restored", "score", "harm"), t, strict=True))
                      for t in found.trace]}


def _said(told: dict[str, Any]) -> list[str]:
    if "zeroed" in told:
        shares = told["zeroed"].values()
        return [f"  {len(shares)} matrices, {sum(shares) / len(shares):.1%} of each zero on the "
                "mean; burnish audit and evaluate say what it was worth"]
    first = told["trace"][0]
    return [f"  {told['restored']:.2%} of the weights are the aligned model's again, after step "
            f"{told['step']}{' with rollback' if told['rollback'] else ''}",
            f"  score {first['score']:.4g} -> {told['score']:.4g}, harm {first['harm']:.4g} -> "
            f"{told['harm']:.4g}"]
