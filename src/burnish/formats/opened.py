"""A model folder opened without reading it: every large weight waits in its file.

transformers builds the model and settles all that a folder may ask for (names that changed, weights
that are put together from several, ties, buffers, a head that the files lack), on tensors that have
a shape and one entry of memory. The parameter in which such a tensor arrives untouched is read from
that place of the file later (core/unread.py). What was made of others (experts that are stacked, a
weight in another dtype) is made once, one parameter at a time, and waits in a file of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..blocks.tape import disk
from ..core import unread
from ..core.dtypes import dtype_of
from ..core.errors import ConfigError, FormatError
from ..core.extras import worded
from ..core.unread import blank, close, mark, source_of
from . import safe
from .model_files import check_weights, loading


@worded()
def open_model(folder: str | Path, dtype: torch.dtype | str | None = None) -> nn.Module:
    """The transformers model of a folder, for :func:`tune`: its weights are read one by one.

    tune(open_model(folder), "nf4 + lora + checkpoint") holds the weights in the form that storage
    gives them, and one of them as it stands in the file; the same bits as loading the model whole.
    Before that the model has shapes and no values, and refuses to run. What the base was waits in
    the folder, which must stay as it is while ``detach`` or ``merge`` may ask for it.

    folder: with config.json and safetensors, in one file or in shards with their index.
    dtype: of the weights; None takes the config's, or the files'.

    Raises FormatError for pickled, truncated or changed files, and for tensors that are missing or
    belong to no part of the model; ConfigError for a folder that holds no transformers model.
    """
    from transformers import AutoConfig

    from ..core.architecture import architecture

    dtype = dtype_of(dtype)
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json, so it is no model folder")
    with loading(str(folder), "the model of"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls = architecture(config)
        check_weights(str(folder), lambda: cls(config))
        model, found = opened(Path(folder), cls, config, dtype,
                              ignore_mismatched_sizes=True)         # they are named below
    changed = [k[0] if isinstance(k, tuple) else k for k in found["mismatched_keys"]]
    for keys, what in ((found["missing_keys"], "lack"), (changed, "have in another shape"),
                       (found["unexpected_keys"], "hold, and no part of the model is called,")):
        if keys:
            named = ", ".join(sorted(keys)[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise FormatError(f"{folder}: the files of this {cls.__name__} {what} {named}{more}")
    return model


def opened(folder: Path, cls: Any, config: Any, dtype: torch.dtype | str | None = None, **kw: Any
           ) -> tuple[nn.Module, dict[str, Any]]:
    """(the model, unread; what transformers says of missing, unexpected and mismatched tensors).

    kw: as for ``from_pretrained``.
    """
    held = stored(folder)
    state = {name: blank(h.shape, h.dtype) if h.waits else h.read() for name, h in held.items()}
    names = {t.data_ptr(): n for n, t in state.items() if held[n].waits}

    def load() -> tuple[nn.Module, dict[str, Any]]:
        with _in_turn():
            return cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype or "auto",
                                       output_loading_info=True, **kw)

    drawn = torch.get_rng_state()                # what the files lack is drawn once
    with _set_aside(set(names), kept=False):
        model, found = load()
    straight = {names.get(p.data_ptr()) for p in model.parameters()}
    if left := [n for n in names.values() if n not in straight]:
        del model                                # what others were made of is made of values now
        state.update((n, _Lazy.of(state[n], held[n])) for n in left)
        torch.set_rng_state(drawn)
        with _set_aside(set(names), kept=True):
            model, found = load()
    for p in model.parameters():
        if (name := names.get(p.data_ptr())) is not None:
            mark(p, held[name])
    _named(model, folder)
    if any(source_of(p) is not None for p in model.parameters()):
        close(model)
    return model, found


def opens(folder: str | Path) -> bool:
    """Does the folder hold a model that can be opened: safetensors, in the dtype they run in?"""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        return False
    return "quantization_config" not in safe.read_json(folder / "config.json")


@worded()
def opened_as(auto: Any, folder: str | Path, dtype: torch.dtype | str | None = None, **kw: Any
              ) -> tuple[nn.Module, dict[str, Any]]:
    """As ``auto.from_pretrained(folder, **kw)`` of one of transformers' Auto classes, unread."""
    from transformers import AutoConfig
    from transformers.models.auto.auto_factory import _get_model_class

    folder = Path(folder).expanduser()
    config, rest = AutoConfig.from_pretrained(folder, trust_remote_code=False,
                                              return_unused_kwargs=True, **kw)
    if type(config) not in auto._model_mapping:
        raise ValueError(f"{auto.__name__} knows no {type(config).__name__}")
    return opened(folder, _get_model_class(config, auto._model_mapping), config, dtype, **rest)


def stored(folder: Path) -> dict[str, Held]:
    """Where every tensor of a model folder stands."""
    out: dict[str, Held] = {}
    for file in safe.weight_files(folder):
        state = _state(file)
        places, aliases = safe.layout(file)
        own = {n: Held(file, start, shape, dtype, state)
               for n, (dtype, shape, start) in places.items()}
        out |= own | {a: own[n] for a, n in aliases.items()}
    return out


@dataclass(frozen=True)
class Held:
    """A tensor's place in a safetensors file. state: of the file as it was when it was opened."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def waits(self) -> bool:
        return self.nbytes >= unread.WAITS

    def read(self) -> Tensor:
        """Its values. Raises FormatError where the file is not what it was."""
        if _state(self.file) != self.state:
            raise FormatError(f"{self.file} has changed since the model was opened; its weights "
                              "can no longer be read")
        return disk.read(self.file, self.nbytes, self.start).view(self.dtype).view(self.shape)


class Spooled:
    """A parameter that was made of others and waits in a file of its own."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], number: int, value: Tensor):
        self.folder, self.shape, self.dtype = folder, value.shape, value.dtype
        self.file = Path(folder.name) / f"{number}.bin"
        disk.write(self.file, value)

    def read(self) -> Tensor:
        nbytes = self.shape.numel() * self.dtype.itemsize
        return disk.read(self.file, nbytes).view(self.dtype).view(self.shape)


class _Lazy(torch.Tensor):
    """Looks like a tensor without values, and is read from its file when it is indexed."""

    held: Held

    @staticmethod
    def of(like: Tensor, held: Held) -> _Lazy:
        made = torch.Tensor._make_subclass(_Lazy, like)
        made.held = held
        return made

    def __getitem__(self, index: Any) -> Tensor:
        return self.held.read()[index]


@contextlib.contextmanager
def _set_aside(blanks: set[int], kept: bool) -> Iterator[None]:
    """Inside, a large weight that the loader puts into a model goes to a file, or with ``kept``
    False nowhere, unless it is one of the `blanks` (by address)."""
    thread, count = threading.get_ident(), iter(range(1 << 62))
    folder = tempfile.TemporaryDirectory(prefix="burnish-")

    def aside(module: nn.Module, name: str, p: Any) -> nn.Parameter | None:
        # the loader says of what comes from files that it needs no initialising
        if threading.get_ident() != thread or not isinstance(p, nn.Parameter) \
                or not getattr(p, "_is_hf_initialized", False) or p.device.type == "meta" \
                or source_of(p) is not None or p.nbytes < unread.WAITS or p.data_ptr() in blanks:
            return None
        stands = nn.Parameter(blank(p.shape, p.dtype), p.requires_grad)
        stands.__dict__.update(p.__dict__)
        if kept:
            mark(stands, Spooled(folder, next(count), p))
        return stands

    handle = register_module_parameter_registration_hook(aside)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """transformers makes one parameter after the other; on threads of its own it would make many
    at once."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _named(model: nn.Module, folder: Path) -> None:
    """What ``from_pretrained`` of the folder itself would have noted and read beside weights."""
    from transformers import GenerationConfig

    model.config._name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _state(file: Path) -> tuple[int, ...]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino
