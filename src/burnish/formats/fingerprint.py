"""Which base does an adapter belong to? Names, shapes, dtypes and content of its parameters.

One line per parameter, ``dtype[shape] sha256``; the fingerprint is the SHA-256 over the sorted
lines. The lines are kept (with 16 digits of their hash), so that a base that is not the same is
refused with the first parameter that differs. Buffers count by shape only: running statistics
move in training. So do parameters that an adapter carries whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from ..core.dtypes import PLAIN
from ..core.errors import FormatError
from ..core.processes import here
from ..core.unread import values

_PIECE = 1 << 24
_cache: Any = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Fingerprint:
    """digest: 64 hex digits. tensors: name -> ``dtype[shape]`` or ``dtype[shape] hash16``."""

    digest: str
    tensors: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"sha256": self.digest, "tensors": self.tensors}


def fingerprint(model: nn.Module, taken: Mapping[str, str] | None = None,
                whole: Container[str] = ()) -> Fingerprint:
    """The fingerprint of a model's base.

    taken: lines recorded earlier by :func:`line`, for parameters whose original is gone (held in
    another form) or about to change. whole: names whose content does not count.
    """
    lines = dict(_lines(model, whole, taken or {}))
    for name, text in (taken or {}).items():
        lines[name] = _no_content(text) if name in whole else text
    total = hashlib.sha256("\n".join(f"{n} {lines[n]}" for n in sorted(lines)).encode())
    return Fingerprint(total.hexdigest(), {n: _short(lines[n]) for n in sorted(lines)})


def dtype_of(base: Mapping[str, Any]) -> str | None:
    """The numbers that most tensors of a recorded base are of ("bfloat16"), so that it can be
    loaded as it was; None where no plain ones are recorded."""
    tensors = (base.get("fingerprint") or {}).get("tensors", {})
    kinds = Counter(text.partition("[")[0] for text in tensors.values())
    plain = [k for k, _ in kinds.most_common() if k in PLAIN]
    return plain[0] if plain else None


def lines(model: nn.Module, whole: Container[str], taken: Container[str]) -> dict[str, str]:
    """The lines of those parameters of a base that are not in `taken`."""
    params = {n for n, _ in model.named_parameters()}
    return {n: text for n, text in _lines(model, whole, taken) if n in params}


def first_difference(recorded: Mapping[str, str], model: nn.Module,
                     taken: Mapping[str, str] | None = None) -> str | None:
    """Where `model` is not what was recorded, in words; None when it is.

    Names, shapes and dtypes are compared first, then content parameter by parameter, reading no
    further than the first difference. Only what was recorded with content is compared by it.
    """
    here = {**{n: _shape(t) for n, t in _tensors(model)},
            **{n: _no_content(t) for n, t in (taken or {}).items()}}
    for name in sorted({*recorded, *here}):
        if name not in here:
            return f"{name} is missing ({recorded[name].partition(' ')[0]} in the adapter's base)"
        if name not in recorded:
            return f"{name} ({here[name]}) is not in the adapter's base"
        if (was := _no_content(recorded[name])) != here[name]:
            return f"{name} is {here[name]}, the adapter's base has {was}"
    tensors = dict(_tensors(model))
    for name in sorted(recorded):
        if " " not in recorded[name]:
            continue
        now = (taken or {}).get(name) or line(tensors[name])
        if " " in now and _short(now) != recorded[name]:
            return f"{name} has the shape of the adapter's base but other values"
    return None


def check_tied(there: Mapping[str, Tensor], values: Mapping[str, Tensor], where: Any) -> None:
    """Raises FormatError when two names of one tensor of the model come with two values: one of
    them would win, and nobody would know which."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in values.items():
        t = there.get(name)
        if t is None or t.device.type == "meta" or not t.numel():
            continue
        t = here(t)
        key = (t.device, t.data_ptr(), t.shape, t.stride())
        first = seen.setdefault(key, name)
        if first != name and not torch.equal(values[first], value):
            raise FormatError(f"{where}: {first} and {name} are one tensor in this model, and the "
                              "file holds two different values for it")


def line(tensor: Tensor, content: bool = True) -> str:
    """``dtype[shape] sha256`` of one tensor; without the hash where it has no values."""
    if not content or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return _shape(tensor)
    with values(tensor):
        return _content(tensor.detach())


def _content(t: Tensor) -> str:
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    digest = hashlib.sha256()
    flat = t.contiguous().view(-1).view(torch.uint8) if t.numel() else t.new_empty(0)
    for i in range(0, flat.numel(), _PIECE):
        digest.update(flat[i : i + _PIECE].cpu().numpy())
    return f"{_shape(t)} {digest.hexdigest()}"


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}".replace(" ", "")


def _no_content(text: str) -> str:
    return text.partition(" ")[0]


def _short(text: str) -> str:
    head, _, digest = text.partition(" ")
    return f"{head} {digest[:16]}" if digest else head


def _is_base(name: str) -> bool:
    return re.search(r"(^|\.)burnish\.", name) is None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that a file would hold, what burnish added left out."""
    for name, p in model.named_parameters():
        if _is_base(name):
            yield name, p
    for path, module in model.named_modules():
        for name, b in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if b is not None and name not in module._non_persistent_buffers_set and _is_base(full):
                yield full, b


def _lines(model: nn.Module, whole: Container[str], taken: Container[str]
           ) -> Iterator[tuple[str, str]]:
    """Hashing lets go of the interpreter, so parameters are hashed side by side."""
    items = [(n, t) for n, t in _tensors(model) if n not in taken]

    def of(item: tuple[str, Tensor]) -> tuple[str, str]:
        name, t = item
        if name in whole or not isinstance(t, nn.Parameter) or isinstance(t, FakeTensor):
            return name, _shape(t)
        key = (t._version, t.data_ptr(), t.dtype)
        if (hit := _cache.get(t)) and hit[0] == key:
            return name, hit[1]
        text = line(t)
        _cache[t] = (key, text)
        return name, text

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(of, items)
