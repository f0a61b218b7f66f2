"""``burnish combine``: several tuned folders made into one by the rules of the literature."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .files import Force, Output
from .mixing import finish
from .screen import emit

#: ways that add factors of LoRA adapters as they are
FORMS = ("cat", "svd", "linear")


@app.command()
def combine(
    folders: Annotated[list[Path], typer.Argument(help="Model folders tuned from one base, or "
                                                       "adapters (burnish's or PEFT's) of one.")],
    output: Output,
    how: Annotated[str, typer.Option(help="A rule, and what is done before it: ties, pcb, "
                                          "task_arithmetic, soup(kind='uniform'), dare + ties, "
                                          "... Of LoRA adapters also cat, svd, linear.")] = "ties",
    base: Annotated[str | None, typer.Option(help="The base's folder; of adapters, default: what "
                                                  "they say.")] = None,
    weights: Annotated[str | None, typer.Option(help="What each counts: 1,0.5 (default: 1 each)."
                                                )] = None,
    rank: Annotated[int | None, typer.Option(help="Of adapters: write a LoRA adapter of this rank "
                                                  "instead of a model.", min=1)] = None,
    data: Annotated[str | None, typer.Option(help="Held-out data, as for fit, that chooses the "
                                                  "rule's scale; never the test set.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: validation, else the only one.")
                     ] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 16,
    metric: Annotated[str | None, typer.Option(help="A figure of evaluate; default: accuracy, "
                                                    "else loss.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge tuned models or adapters: TIES, DARE, PCB, task arithmetic, sums of factors.

    Of model folders one tensor is in memory at a time. Adapters of any method that changes weights
    are merged as what they change; the result is a model, or with --rank a LoRA adapter, whose
    distance from the exact merge is told. Heads of adapters are averaged.
    """
    if len(folders) < 2:
        raise ConfigError("two folders or more are merged")
    w = _weights(weights, len(folders))
    adapters = _kind(folders) == "adapter"
    if how.strip() in FORMS:
        said = _factors(how.strip(), folders, w, output, rank, base, data)
    elif adapters:
        if data is not None:
            raise ConfigError("--data scores whole models; make them with `burnish merge`, and "
                              "combine those")
        said = _adapters(_parts(how), folders, w, output, rank, base, force)
    else:
        said = _models(_parts(how), folders, w, output, rank, base, (data, split, batch, metric))
    lines = [f"{said['kind']} written to {output} ({said['how']})"]
    if "scale" in said:
        lines.append(f"  scale {said['scale']:g} is best on held-out data ({said['score']:.4g})")
    if said.get("error"):
        lines.append(f"  rank {rank} leaves out {said['error']:.2%} of the merged change")
    lines += [f"  {n} stays the base's: {why}" for n, why in said.get("left", {}).items()]
    lines += [f"  {n} is the mean of the adapters' own" for n in said.get("averaged", ())]
    emit(json, {"output": output, **said}, "\n".join(lines))


def _parts(how: str) -> list[Any]:
    from ..blocks.weight.taskvector import check_parts
    from ..core.recipe import parse

    parts = list(parse(how))
    check_parts(parts)                           # before anything is read
    return parts


def _weights(text: str | None, many: int) -> list[float]:
    if text is None:
        return [1.0] * many
    try:
        found = [float(x) for x in text.split(",")]
    except ValueError:
        found = []
    if len(found) != many:
        raise ConfigError(f"--weights {text}: {many} numbers are expected, one for each folder, "
                          "as in 1,0.5")
    return found


def _kind(folders: Sequence[Path]) -> str:
    from ..formats import combine

    peft = [f for f in folders if combine.of_peft(f)]
    rest = [f for f in folders if f not in peft]
    kind = combine.kind_of(rest) if rest else "adapter"
    if peft and kind == "model":
        raise ConfigError(f"{peft[0]} holds an adapter and {rest[0]} a whole model, which have no "
                          f"sum; make {peft[0]} one with `burnish merge` first")
    return kind


def _factors(form: str, folders: Sequence[Path], weights: Sequence[float], output: Path,
             rank: int | None, base: str | None, data: str | None) -> dict[str, Any]:
    from ..formats import combine

    if data is not None:
        raise ConfigError(f"--data chooses the scale of a rule, and {form} has none")
    if _kind(folders) == "model":
        raise ConfigError(f"{form} adds the factors of LoRA adapters; whole models are added by "
                          "task_arithmetic")
    if peft := [f for f in folders if combine.of_peft(f)]:
        raise ConfigError(f"{peft[0]} is PEFT's; {form} adds factors of burnish's adapters. "
                          "A rule takes both: --how 'task_arithmetic(scale=1.0)' --rank R")
    if rank is not None and form != "svd":
        raise ConfigError(f"--rank is of svd; {form} has a rank of its own")
    left: dict[str, str] = {}

    def write(new: Path) -> None:
        left.update(combine.sum_adapters(folders, weights, new, rank, form=form, mean=True))

    finish("adapter", [*folders, *([Path(base)] if base else [])], output, write)
    return {"kind": "adapter", "how": form, "averaged": sorted(left)}


def _adapters(parts: list[Any], folders: Sequence[Path], weights: Sequence[float], output: Path,
              rank: int | None, base: str | None, force: bool) -> dict[str, Any]:
    from ..formats.combine import facts_of_task
    from ..formats.combined import Made, merge_adapters
    from ..formats.model_files import copy_processor
    from .files import attached

    source = ""
    made: Made | None = None

    def opened(i: int, unread: bool = True) -> Any:
        nonlocal source
        tuned, source = attached(folders[i], base or (source or None), force, unread)
        return tuned

    def write(new: Path) -> None:
        nonlocal made
        made = merge_adapters(opened, lambda: opened(0, unread=False), [str(f) for f in folders],
                              parts, weights, new, rank, facts_of_task(folders[0]))
        copy_processor([Path(source), folders[0]], new)

    kind = "model" if rank is None else "adapter"
    finish(kind, [*folders, *([Path(base)] if base else [])], output, write)
    assert made is not None
    return {"kind": kind, "how": _said(parts), "averaged": made.whole, "error": made.error}


def _models(parts: list[Any], folders: Sequence[Path], weights: Sequence[float], output: Path,
            rank: int | None, base: str | None, held_out: tuple[Any, ...]) -> dict[str, Any]:
    from dataclasses import replace
    from functools import partial

    from ..formats import combine

    if rank is not None:
        raise ConfigError("--rank is of adapters, and these are whole models")
    if base is None:
        raise ConfigError("whole models are merged by what they changed; give --base, the folder "
                          "they were tuned from")
    start = Path(base)
    combine.kind_of([start, *folders])
    reads = [start, *folders]
    told: dict[str, Any] = {"kind": "model"}

    def write(now: list[Any], new: Path) -> None:
        told["left"] = combine.merge_models(start, folders, weights, now, new)

    if held_out[0] is not None:
        from .mixing import scored_beside
        from .scoring import scorer

        rule = parts[-1]
        if not (grid := getattr(rule, "grid", ())):
            raise ConfigError(f"--data chooses a scale, and {rule.name} has none")
        score = scorer("model", folders, *held_out)
        tried = {s: [*parts[:-1], replace(rule, scale=s)] for s in grid}
        scores = {s: scored_beside(output, partial(write, p), score) for s, p in tried.items()}
        scale = max(scores, key=lambda s: (scores[s], -s))
        parts = tried[scale]
        told |= {"scale": scale, "score": scores[scale], "scores": scores}
    finish("model", reads, output, lambda new: write(parts, new))
    return {**told, "how": _said(parts)}


def _said(parts: Sequence[Any]) -> str:
    return " + ".join(str(p) for p in parts)

