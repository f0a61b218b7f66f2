"""Adapters and models that travel: to the hub with their card, and from it into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core.errors import BurnishError, ConfigError, FormatError
from . import safe, staged
from .folder import CARD, CONFIG, RUN, TENSORS, read_adapter, read_config
from .hub import INDEX, errors, offline, resolve
from .model_files import PROCESSOR

#: what a folder is pushed with beside its weights
BESIDE = (CARD, RUN, "config.json", "generation_config.json", INDEX, *PROCESSOR)


def push(folder: str | Path, repo_id: str, private: bool = True, revision: str | None = None,
         message: str | None = None) -> str:
    """Upload an adapter or a merged model to the hub; returns the address of the commit.

    folder: as ``save``, ``fit``, ``merge`` or ``export --for peft`` left it. Its weights, its
    configuration, its tokenizer, card and run.json go, and nothing else that lies there.
    repo_id: ``owner/name``; it is made where there is none. private: whether a new one is.
    revision: a branch, made where there is none; the default one otherwise.

    Everything is looked at before anything is sent. Raises FormatError for what is no such folder
    or is damaged, ConfigError for a name or token that the hub refuses, BurnishError when offline.
    """
    folder = Path(folder)
    files, what = _checked(folder)
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise ConfigError("pushing needs huggingface-hub: pip install 'burnish[fit]'") from None
    if offline():
        raise BurnishError("HF_HUB_OFFLINE is set: nothing is pushed")
    card = folder / CARD
    with errors(repo_id, revision, "pushed"):
        api = HfApi()
        repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        adds = [CommitOperationAdd(f.name, str(f)) for f in files if f != card]
        if card in files:                    # it says how to get what is pushed
            there = f'"{repo_id}"' if what == "model" else f'burnish.pull("{repo_id}")'
            text = card.read_text("utf-8").replace('"path/to/this/folder"', there)
            adds.append(CommitOperationAdd(CARD, text.encode()))
        done = api.create_commit(repo_id, adds, revision=revision,
                                 commit_message=message or f"Upload {what}")
    return str(done.commit_url)


def pull(repo_id: str, output: str | Path | None = None, revision: str | None = None) -> Path:
    """Fetch an adapter or a model from the hub; returns its folder.

    repo_id: ``owner/name``. revision: a branch, a tag or a commit. output: a folder to write (an
    older one that burnish wrote is replaced); None: the hub's cache, whose files are read only.

    What was fetched before is not fetched again, and with ``HF_HUB_OFFLINE`` nothing is. Raises
    as :func:`push` does, and FormatError for weights that are pickled, damaged or of another save.
    """
    if Path(repo_id).expanduser().exists():
        raise ConfigError(f"{repo_id} is a folder here; pull takes the name of a repository")
    found = resolve(repo_id, revision)
    files, what = _checked(found, repo_id)
    if output is None:
        return found
    with staged.replace(Path(output), "model" if what == "model" else "adapter") as new:
        for file in files:
            shutil.copyfile(file, new / file.name)
    return Path(output)


def _checked(folder: Path, name: str | None = None) -> tuple[list[Path], str]:
    """(the files that travel, what they are: "adapter" or "model"), read through once."""
    if name and not any((folder / f).is_file() for f in (CONFIG, "config.json")):
        raise FormatError(f"{name} holds no adapter and no model: neither {CONFIG} nor config.json")
    name = name or str(folder)
    if (folder / CONFIG).is_file() or not (folder / "config.json").is_file():
        if not (folder / CONFIG).is_file() or "peft_type" not in safe.read_json(folder / CONFIG):
            read_config(folder)                           # says what is missing, or whose it is
            read_adapter(folder)
        what, names = "adapter", [CONFIG, TENSORS]
        if not (folder / TENSORS).is_file():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in safe.PICKLES)
            raise FormatError(f"{name} has no {TENSORS}" + (
                f"; {pickles[0]} may hold a pickle and is not opened" if pickles else ""))
        weights = [folder / TENSORS]
    else:
        what, names = "model", ["config.json"]
        weights = safe.weight_files(folder)
        names += [f.name for f in weights]
    for file in weights:
        safe.header(file)
    found = [folder / n for n in names]
    found += [f for pattern in BESIDE for f in sorted(folder.glob(pattern)) if f.is_file()]
    return list(dict.fromkeys(found)), what
