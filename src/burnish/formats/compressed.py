"""One safetensors file for an update in few bytes, and the folder that it becomes again.

Tensors: ``payload/...`` and ``scale...`` of the code (a method that answers
:class:`~burnish.blocks.weight.coded.Codes`), ``whole/<name>`` for what has no start to be a
difference from (a new head, whole numbers). The header's words: ``method`` (a recipe), ``version``,
``kind`` ("model" or "adapter"), ``base`` and ``base_sha256`` (over the sorted lines of its tensors,
as in fingerprint.py), ``order`` (names, dtypes and shapes of the update, flat in this order), and
the texts that stand beside the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks.weight.checkpoints import Checkpoint, facts
from ..blocks.weight.coded import Coded, Codes
from ..blocks.weight.taskvector import Task, TaskVector, combine
from ..core.errors import ConfigError, FormatError
from ..core.recipe import parse
from . import safe
from .combine import facts_of_task, open_models
from .fingerprint import fingerprint, line
from .folder import read_adapter, write_adapter
from .model_files import copy_processor

VERSION = "1"
#: files of a model folder whose text goes along
BESIDE = ("config.json", "generation_config.json")


def compress_model(tuned: Path, base: Path, how: Any, output: Path) -> dict[str, Any]:
    """Write the update of a model folder; what came of it (see :func:`_write`)."""
    first, second = open_models([base, tuned])
    task = TaskVector(first, second)
    if not task.names:
        raise ConfigError(f"{tuned} has no tensor in common with {base}")
    whole = {n: second[n] for n in second if n not in task.shapes and n not in task.tied}
    beside = {n: (tuned / n).read_text("utf-8") for n in BESIDE if (tuned / n).is_file()}
    return _write(how, task, whole, output, {
        "kind": "model", "base": str(base), "base_sha256": digest_of(first, task.names),
        "tied": json.dumps(task.tied), "beside": json.dumps(beside)}, second)


def compress_adapter(folder: Path, start: Callable[[], Any], how: Any, output: Path
                     ) -> dict[str, Any]:
    """The same of an adapter folder. start(): it on its base as it was before training."""
    config, tensors = read_adapter(folder)
    if len(config.get("adapters") or {}) > 1:
        raise ConfigError(f"{folder} holds several adapters; save the one that is meant by itself")
    fresh = start()
    first = _first(fresh, tensors)
    task = TaskVector(first, tensors)
    whole = {n: t for n, t in tensors.items() if n not in task.shapes and n not in task.tied}
    if not task.names:
        raise ConfigError(f"{folder} holds nothing that is a change of where it began")
    config.pop("tensors_sha256", None)
    own = {k: v for k, v in config.items() if k not in ("library", "format", "burnish")}
    return _write(how, task, whole, output, {
        "kind": "adapter", "base": str(config["base"].get("name") or ""),
        "base_sha256": fingerprint(fresh.detach()).digest, "tied": json.dumps(task.tied),
        "config": json.dumps(own), "run": json.dumps(facts_of_task(folder))}, tensors)


def _first(fresh: Any, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors before training, of those that are in its file and of their shape."""
    return {n: t.detach().cpu() for n, t in fresh.tensors().items()
            if n in like and t.shape == like[n].shape}


def _write(how: Any, task: Task, whole: Mapping[str, Tensor], output: Path,
           told: Mapping[str, str], of: Checkpoint) -> dict[str, Any]:
    """bytes: of the file.  payload: of the code.  update: what the update takes in the dtypes it
    came in.  entries: of the update.  bits: of the code, per entry."""
    if not isinstance(how, Codes):
        raise ConfigError(f"{how.name} says nothing about compressing; compeft and delta_quant do")
    coded = how.encode(task)
    order = [[n, str(facts(of, n).dtype).removeprefix("torch."), list(s)]
             for n, s in task.shapes.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    safe.save_file({**coded.tensors, **{f"whole/{n}": t.contiguous() for n, t in whole.items()}},
                   output, {"library": "burnish", "version": VERSION, "method": str(how),
                            "order": json.dumps(order), **coded.told, **told})
    update = sum(facts(of, n).nbytes for n in task.names)
    return {"bytes": output.stat().st_size, "payload": coded.nbytes, "update": update,
            "whole": sorted(whole), "entries": task.numel,
            "bits": 8 * coded.nbytes / task.numel, **{
                k: int(v) for k, v in coded.told.items() if k == "count"}}


# -- and back -------------------------------------------------------------------------------------
class Update:
    """A file that one of these wrote, its header read. Raises FormatError for anything else."""

    def __init__(self, path: Path):
        self.path, self.told = path, safe.metadata(path)
        if self.told.get("library") != "burnish" or "method" not in self.told:
            raise FormatError(f"{path} is no compressed update; `burnish compress` writes one")
        if self.told.get("version") != VERSION:
            raise FormatError(f"{path} is of version {self.told.get('version')}; this burnish "
                              f"reads {VERSION}")
        self.how = next(iter(parse(self.told["method"])))
        if not isinstance(self.how, Codes):
            raise FormatError(f"{path} says it was written by {self.told['method']}, which "
                              "compresses nothing")
        self.shapes = {n: torch.Size(s) for n, _, s in self.words("order", list)}

    def words(self, key: str, kind: type) -> Any:
        try:
            found = json.loads(self.told[key])
        except (KeyError, ValueError):
            found = None
        if not isinstance(found, kind):
            raise FormatError(f"{self.path}: the header's {key!r} cannot be read")
        return found

    @property
    def kind(self) -> str:
        return self.told.get("kind", "")

    @property
    def base(self) -> str:
        return self.told.get("base", "")

    def task(self) -> Task:
        tensors = safe.Tensors(self.path)
        held = {n: tensors[n] for n in tensors if not n.startswith("whole/")}
        task: Task = self.how.decode(Coded(held, self.told), self.shapes)
        task.tied = self.words("tied", dict)
        return task

    def whole(self) -> dict[str, Tensor]:
        tensors = safe.Tensors(self.path)
        return {n.removeprefix("whole/"): tensors[n] for n in tensors if n.startswith("whole/")}

    def check(self, found: str, base: str) -> None:
        if found != self.told.get("base_sha256"):
            raise FormatError(f"{self.path} was made on another base than {base}: its weights "
                              f"have the hash {found[:16]}, not "
                              f"{self.told.get('base_sha256', '')[:16]}")


def expand_model(update: Update, base: Path, new: Path) -> None:
    """The tuned model as a folder in `new`: ``theta_0 + tau'``, tensor by tensor."""
    first, = open_models([base])
    if missing := [n for n in update.shapes if n not in first]:
        raise FormatError(f"{update.path} changes {missing[0]}, and {base} has none")
    update.check(digest_of(first, list(update.shapes)), str(base))
    whole = update.whole()
    like = {n: facts(first, n) for n in first if n in update.shapes
            or n in update.words("tied", dict)} | whole
    made = combine(_Some(first, like, whole), [update.task()], lambda taus, *_: taus[0])
    safe.save_stream(made, like, new / "model.safetensors")
    for name, text in update.words("beside", dict).items():
        safe.write_text(new / Path(name).name, text)
    copy_processor([base], new)


class _Some(Mapping[str, Tensor]):
    """Of a checkpoint what an update says of: the base's tensors, or those that came whole."""

    def __init__(self, base: Checkpoint, names: Mapping[str, Tensor], whole: Mapping[str, Tensor]):
        self.base, self.names, self.whole = base, names, whole

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[name] if name in self.whole else self.base[name]

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def expand_adapter(update: Update, start: Callable[[Mapping[str, Any]], Any], new: Path) -> None:
    """The adapter folder again. start(config): the adapter of this configuration on its base, as
    it was before training."""
    config = update.words("config", dict)
    fresh = start(config)
    like = {n: torch.empty(s, device="meta") for n, s in update.shapes.items()}
    first = _first(fresh, like)
    if missing := [n for n in update.shapes if n not in first]:
        raise FormatError(f"{update.path} changes {missing[0]}, which an adapter of this recipe "
                          "does not have")
    update.check(fingerprint(fresh.detach()).digest, "the one given")
    dtypes = {n: getattr(torch, d) for n, d, _ in update.words("order", list)}
    first = {n: first[n].to(dtypes[n]) for n in update.shapes}
    tied = {n: first[o] for n, o in update.words("tied", dict).items()}
    made = dict(combine({**first, **tied}, [update.task()], lambda taus, *_: taus[0]))
    run = json.loads(update.told.get("run", "null"))
    write_adapter(new, {**made, **update.whole()}, config, run=run)


def digest_of(model: Checkpoint, names: Any) -> str:
    """SHA-256 over the sorted lines of these tensors."""
    lines = [f"{n} {line(model[n])}" for n in sorted(names)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
