"""``burnish edit``: a language model with other answers to a few prompts, and little else moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError, nearest
from .app import Json, app
from .screen import emit, table

#: figure -> what its row says
SAID = {"success": "answers as wanted", "general": "other wordings as wanted",
        "local": "texts that go on as before", "moved": "mean KL on these texts"}


@app.command()
def edit(
    source: Annotated[Path, typer.Argument(help="The folder of a language model.")],
    edits: Annotated[Path, typer.Argument(help="A table with prompt and answer; rephrased and "
                                               "local where they are to be measured.")],
    lessons: Annotated[Path | None, typer.Option(help="A table of such edits to learn from, with "
                                                      "prompt, answer, rephrased and local.")
                       ] = None,
    editor: Annotated[Path | None, typer.Option(help="A .safetensors file of what was learnt: with "
                                                     "--lessons it is written, without them read."
                                                )] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for the edited model; without it "
                                                     "nothing is written.")] = None,
    how: Annotated[str | None, typer.Option(help="The method, with its settings; default: mend, or "
                                                 "what the editor was made by.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the lessons.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the order of lessons.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Prompts as they stand, without the "
                                                        "tokenizer's chat template.")] = False,
    json: Json = False,
) -> None:
    """Edit answers: burnish edit MODEL edits.csv --lessons lessons.csv --output edited

    A net learns of the lessons how a gradient is to be turned, then all rows of edits are one edit.
    Told are success, other wordings, and what moved elsewhere, before and after. --editor keeps the
    net, so that a second edit has no lessons to learn.
    """
    from ..fit import edits as of
    from ..formats import claim, staged
    from ..formats import editor as kept
    from ..formats.combine import kind_of
    from .auditing import language_model

    learnt = _learnt(lessons, editor, how)
    part = _part(how or learnt.get("how", "mend"))
    if kind_of([source]) != "model":
        raise ConfigError(f"{source} is an adapter, and a plain model is edited: burnish merge "
                          "makes one of it")
    reads = [source, edits, *([editor] if lessons is None else [lessons])]    # type: ignore[list-item]
    if output is not None:
        claim.refuse_overlap(output, [("an input", f) for f in reads], whole=True)
        staged.refuse_others(output, "model")            # before anything is loaded
    wanted = of.cases(edits)
    taught = [] if lessons is None else of.cases(lessons, lessons=True)
    model, tokenizer = language_model(str(source))
    from ..fit.safety import check_causal

    check_causal(model)
    wording = of.Wording(model, _with_end(tokenizer, source), True if plain else None)
    batch = wording.edit(wanted)                         # what cannot be asked is refused here
    notes = []
    if lessons is None:
        turns = part.editor(model.eval())
        if not kept.load(turns, editor):                 # type: ignore[arg-type]
            notes = [f"{editor} has learnt on other weights than those of {source}: edits are less "
                     "sure the further they are apart"]
    else:
        turns = part.lifecycle(model.eval(), of.lessons(wording, taught, epochs, seed))
        if editor is not None:
            kept.save(turns, str(part), len(taught), editor)
    before = of.look(wording, wanted)
    made = turns(batch)
    made.merge()
    after = of.look(wording, wanted)
    told = {"source": source, "how": str(part), "edits": len(wanted),
            "lessons": len(taught) if lessons is not None else learnt["lessons"],
            "editor": editor, "notes": notes, "epochs": epochs, "seed": seed,
            "matrices": list(made.changes),
            "rank": max(len(left) for left, _ in made.changes.values()),
            "figures": of.figures(before, after),
            "rows": [{"prompt": c.prompt, "answer": c.answer, "before": a, "after": b}
                     for c, a, b in zip(wanted, before.right, after.right, strict=True)],
            "output": output}
    if output is not None:
        _write(model, source, reads, output)
    emit(json, told, "\n".join(_text(told)))


def _learnt(lessons: Path | None, editor: Path | None, how: str | None) -> dict[str, Any]:
    """What an editor's file says of itself, where it is to be read. Raises ConfigError where there
    is nothing to edit by."""
    from ..formats import editor as kept

    if editor is not None and editor.suffix != ".safetensors":
        raise ConfigError(f"--editor {editor}: expected a .safetensors file")
    if lessons is not None:
        if editor is not None and editor.exists():
            raise ConfigError(f"--editor {editor} is there already: leave --lessons out to edit by "
                              "it, or name another file")
        return {}
    if editor is None:
        raise ConfigError("an edit is learnt of --lessons, or has an --editor that was")
    said = kept.said(editor)
    if how is not None and str(_part(how)) != said["how"]:
        raise ConfigError(f"--how {how}: {editor} was made by {said['how']}; leave --how out")
    return said


def _part(text: str) -> Any:
    from ..core import registry
    from ..core.recipe import parse

    parts = list(parse(text))
    if len(parts) != 1 or not getattr(parts[0], "edits", False):
        known = [n for n in registry.names(extra=False)
                 if getattr(registry.find(n), "edits", False)]
        raise ConfigError(f"--how {text}: expected one method that edits: {', '.join(known)}"
                          f"{nearest(text, known)}")
    return parts[0]


def _with_end(tokenizer: Any, source: Path) -> Any:
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer of {source} has no end-of-text token, so where an answer "
                          "ends cannot be told")
    return tokenizer


def _write(model: Any, source: Path, reads: Sequence[Path], output: Path) -> None:
    from ..formats.model_files import copy_processor
    from .mixing import finish

    def write(new: Path) -> None:
        model.save_pretrained(new)
        copy_processor([source], new)

    finish("model", reads, output, write)


def _text(told: Mapping[str, Any]) -> list[str]:
    def cell(name: str, value: float) -> str:
        return f"{value:.4f}" if name == "moved" else f"{value:.1%}"

    rows = [(SAID[n], cell(n, f["before"]), cell(n, f["after"]))
            for n, f in told["figures"].items()]
    where = "nothing was written; --output writes the edited model" if told["output"] is None \
        else f"model written to {told['output']}"
    return [f"{told['edits']} edits of {len(told['matrices'])} matrices by {told['how']}, which "
            f"learnt of {told['lessons']} lessons", "",
            table(["", "before", "after"], rows, right=(1, 2)), "", where,
            *(f"note: {n}" for n in told["notes"]),
            *([f"editor: {told['editor']}"] if told["editor"] is not None else [])]
