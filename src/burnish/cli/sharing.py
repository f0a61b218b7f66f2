"""``burnish push`` and ``pull``: adapters and models to the hub and from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import Json, app
from .screen import emit

Repository = Annotated[str, typer.Argument(help="The repository's name, owner/name.")]


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder of fit, merge or export --for peft.")],
    repository: Repository,
    public: Annotated[bool, typer.Option("--public", help="Where the repository is made now, "
                                         "anybody may read it.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made where there is none.")
                        ] = None,
    message: Annotated[str | None, typer.Option(help="What the commit says.")] = None,
    json: Json = False,
) -> None:
    """Upload an adapter or a merged model to the hub, with its card (HF_TOKEN says who you are).

    The weights, the configuration, the tokenizer, the card and run.json go, and nothing else that
    lies in the folder. A repository that is made for it is private unless --public is given.
    """
    from ..formats import sharing

    url = sharing.push(folder, repository, not public, revision, message)
    text = f"pushed to {url}"
    for note in _notes(folder):
        text += f"\nnote: {note}"
    emit(json, {"folder": folder, "repository": repository, "url": url, "notes": _notes(folder)},
         text)


@app.command()
def pull(
    repository: Repository,
    output: Annotated[Path | None, typer.Option(help="The folder to write; default: the hub's "
                                                "cache.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit.")] = None,
    json: Json = False,
) -> None:
    """Fetch an adapter or a model from the hub: safetensors and text, never a pickle."""
    from ..formats import sharing

    folder = sharing.pull(repository, output, revision)
    base = _base(folder)
    emit(json, {"repository": repository, "folder": folder, "base": base},
         f"{repository} is in {folder}" + (f"; its base is {base}" if base else ""))


def _base(folder: Path) -> str | None:
    """What an adapter says that it was made on."""
    from ..formats import safe
    from ..formats.folder import CONFIG

    if not (folder / CONFIG).is_file():
        return None
    said: Any = safe.read_json(folder / CONFIG)
    base = said.get("base_model_name_or_path") or (said.get("base") or {}).get("name")
    return str(base) if base else None


def _notes(folder: Path) -> list[str]:
    base = _base(folder)
    if base and (Path(base).exists() or base.startswith((".", "/", "~"))):
        return [f"it says that its base is {base}, a folder of this machine: whoever pulls it "
                "gives --base"]
    return []
