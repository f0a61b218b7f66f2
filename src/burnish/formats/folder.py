"""The adapter folder.

    adapter_config.json        whose it is, the recipe, settings per part, the base's fingerprint
    adapter_model.safetensors  what was trained, in the dtype it was trained in
    README.md                  the model card
    run.json                   data, metrics, simulated and measured memory (where there was a run)

Files are written beside and take their places together (staged.py), so a kill leaves the old
adapter or the new one. The configuration names the SHA-256 of the tensors it belongs to: tensors
of which one bit changed, or that were mixed in by hand, are noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core.errors import BurnishError, FormatError, nearest
from ..core.reading import FIELDS as KNOWN_KINDS
from ..core.reading import beside, check_fields, plain, shown
from . import claim, safe, staged
from .card import model_card

#: entries looked at together
_PIECE = 1 << 20

FORMAT = 1
CONFIG, TENSORS, CARD, RUN = ("adapter_config.json", "adapter_model.safetensors", "README.md",
                              "run.json")

#: every field a configuration of this format may have
FIELDS = {
    "library": "always 'burnish'",
    "format": "version of this layout",
    "burnish": "version of the library that wrote it",
    "recipe": "the expression",
    "parts": "settings per part, defaults included",
    "base": "name, revision, and the fingerprint of its tensors",
    "targets": "which weights",
    "adapters": "several adapters of one base: name -> recipe and targets",
    "active": "which of them are in use, with weights",
    "training": "which of those in use trains, null for none",
    "head": "how the head was treated",
    "seed": "what the starting values and masks were drawn from",
    "selected": "base parameters that trained whole",
    "tensors_sha256": "SHA-256 of adapter_model.safetensors",
    "extra": "anything else its writer wants to find again",
}
#: what the fields are (see core/reading.py), for the whole folder and for one adapter of it
KINDS = {"recipe": "text", "parts": "list", "base": "mapping", "targets": "text or texts?",
         "adapters": "mapping?", "active": "list?", "training": "text?", "head": "flag",
         "seed": "whole", "selected": "texts", "tensors_sha256": "text"}
BASE_KINDS = {"name": "text?", "fingerprint": "mapping?"}
#: what `predict` and `evaluate` need of a run
RUN_KINDS = {"model": "text?", "data": "mapping", "tasks": "mapping?", "training": "mapping",
             "max_length": "count?", "task": "mapping?"}
DATA_KINDS = {"task": "text", "source": "text", "layout": "text", "labels": "texts?",
              "reading": "mapping", "fingerprint": "text"}

REQUIRED = ("library", "format", "recipe", "base")


def write_adapter(folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
                  card: str | Literal[False] | None = None, run: Mapping[str, Any] | None = None,
                  inputs: claim.Inputs = ()) -> Path:
    """Write an adapter folder; an older one that burnish wrote in its place is replaced.

    config: the fields of :data:`FIELDS` but the first three, which are filled in, and
    tensors_sha256. card: text of README.md; None writes one from `config` and `run`, False none, so
    that one which is there stays. inputs: what else must not be written over (the base is always
    among it).
    Raises FormatError for an unknown field, ConfigError for files that are not ours or a folder
    that is the base's, BurnishError where the disk refuses or a tensor is not finite.
    """
    folder = Path(folder)
    own = {"library": "burnish", "format": FORMAT, "burnish": _version()}
    _check_fields(config, f"configuration for {folder}")
    for name, t in tensors.items():
        if not finite(t):
            raise BurnishError(f"{name} holds NaN or infinite values; nothing was saved in "
                               f"{folder}")
    base = ("the base model", (config.get("base") or {}).get("name"))
    gone = () if run is not None else (RUN,)             # it spoke of an earlier run
    names = (CONFIG, TENSORS, RUN) if card is False else (CONFIG, TENSORS, CARD, RUN)
    with staged.update(folder, "adapter", names, gone, [base, *inputs]) as new:
        safe.save_file(tensors, new / TENSORS, {"library": "burnish"})
        full = {**own, **config, "tensors_sha256": claim.digest(new / TENSORS)}
        if card is not False:
            safe.write_text(new / CARD, card if card is not None else model_card(full, run))
        if run is not None:
            safe.write_json(new / RUN, run)
        safe.write_json(new / CONFIG, full)
    return folder


def finite(t: Tensor) -> bool:
    """No NaN and no infinity; integers and sizes alone (fake, on meta) pass. Looked at in pieces:
    the test makes tensors of the size of what it tests."""
    if not (t.is_floating_point() or t.is_complex()) or t.device.type == "meta":
        return True
    t = t.detach()
    for piece in t.view(-1).split(_PIECE) if t.is_contiguous() else (t,):
        found = (piece.float() if t.dtype.itemsize == 1 else piece).isfinite().all()  # float8: none
        if isinstance(t, FakeTensor):                    # the first costs what any does
            return True
        if not bool(found):
            return False
    return True


def read_adapter(folder: str | Path, device: str = "cpu") -> tuple[dict[str, Any],
                                                                   dict[str, Tensor]]:
    """(configuration, tensors) of an adapter folder; while another process saves there, those of
    the older or of the newer one.

    Raises FormatError, one line that says what is wrong: a missing folder or file, a PEFT or other
    foreign folder, a pickle, a newer format, an unknown field, corrupt JSON, truncated tensors,
    tensors that belong to another save or hold NaN or infinity.
    """
    folder = Path(folder)
    config, tensors = staged.steady(folder, lambda: _read(folder, device))
    for name, t in tensors.items():
        if not finite(t):
            raise FormatError(f"{folder / TENSORS}: {name} holds NaN or infinite values")
    return config, tensors


def _read(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = _read_config(folder)
    path = staged.current(folder, TENSORS)
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in safe.PICKLES)
        raise FormatError(f"{folder} has no {TENSORS}"
                          + (f"; {pickles[0]} may hold a pickle and is not opened" if pickles
                             else ""))
    tensors = safe.load_file(path, device)
    recorded = config.get("tensors_sha256")
    if recorded and recorded != claim.digest(path):
        raise FormatError(f"{path} is not the file {CONFIG} was written for: "
                          "the save was interrupted, or the file changed since")
    return config, tensors


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked configuration alone, without reading any tensor."""
    folder = Path(folder)
    return staged.steady(folder, lambda: _read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise FormatError(f"{folder} is a file; expected an adapter folder")
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder{nearest(folder.name, beside(folder))}")
    path = staged.current(folder, CONFIG)
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in safe.PICKLES)
        tail = f" ({pickles[0]} may hold a pickle and is not opened)" if pickles else ""
        raise FormatError(f"{folder} is no adapter folder: it has no {CONFIG}{tail}")
    config = safe.read_json(path, finite=True)
    if config.get("library") != "burnish":
        if "peft_type" in config:
            raise FormatError(f"{folder} was written by PEFT ({config['peft_type']}); "
                              "read it with burnish.load_peft(model, folder)")
        raise FormatError(f"{path} was not written by burnish "
                          f"(library is {config.get('library')!r})")
    if type(config.get("format")) is not int:
        raise FormatError(f"{path}: field 'format' should be a number, "
                          f"got {config.get('format')!r}")
    if config["format"] > FORMAT:
        raise FormatError(f"{folder} has format {config['format']}, this burnish reads up to "
                          f"{FORMAT}; a newer burnish is needed")
    _check_fields(config, str(path))
    for name in REQUIRED:
        if name not in config:
            raise FormatError(f"{path}: field {name!r} is missing")
    check_fields(config, KINDS, path)
    check_fields(config["base"], BASE_KINDS, f"{path}, base")
    check_fields((config["base"].get("fingerprint") or {}), {"tensors": "lines"},
                 f"{path}, fingerprint")
    for name, entry in (config.get("adapters") or {}).items():
        where = f"{path}, adapter {name!r}"
        if not isinstance(entry, dict):
            raise FormatError(f"{where}: expected a mapping, got {type(entry).__name__}")
        if "recipe" not in entry:
            raise FormatError(f"{where}: field 'recipe' is missing")
        check_fields(entry, KINDS, where)
    for pair in config.get("active") or ():
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
                and KNOWN_KINDS["number"][1](pair[1])):
            raise FormatError(f"{path}: field 'active' should hold pairs of a name and a weight, "
                              f"got {shown(pair, 60)}")
    return config


def read_run(folder: str | Path) -> dict[str, Any]:
    """The facts of a finished run, with what is needed to open it again."""
    path = staged.current(Path(folder), RUN)
    facts = safe.read_json(path)
    for name in ("data", "training"):
        if name not in facts:
            raise FormatError(f"{path}: field {name!r} is missing, so it is no finished run")
    check_fields(facts, RUN_KINDS, path)
    for name in ("task", "source", "layout", "labels"):
        if name not in facts["data"]:
            raise FormatError(f"{path}: field 'data.{name}' is missing")
    check_fields(facts["data"], DATA_KINDS, f"{path}, data")
    for name, about in (facts.get("tasks") or {}).items():
        check_fields(about, DATA_KINDS, f"{path}, tasks.{plain(name, 40)}")
    check_fields(facts["training"], {"seed": "count"}, f"{path}, training")
    return facts


def _check_fields(config: Mapping[str, Any], where: str) -> None:
    for name in config:
        if name not in FIELDS:
            raise FormatError(f"{where}: unknown field {name!r}{nearest(name, FIELDS)}")


def _version() -> str:
    try:
        return version("burnish")
    except PackageNotFoundError:                        # run from a source tree
        return "0+source"
