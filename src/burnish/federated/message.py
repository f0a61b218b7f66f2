"""What goes between client and server: a safetensors file in memory, whose bytes are counted.

A coding says how numbers are written:

    none    as they are                                4 bytes of an fp32 number
    bf16    rounded to bf16                            2
    8bit    blocks of 256, a byte each and a scale     1.016   (``blocks/update/codecs.py``)
    signs   ComPEFT: signs of the largest 5 % and one size; of changes only     0.042

With `like`, what both sides hold already, the difference to it is coded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..blocks.update.codecs import Block8
from ..blocks.weight.coded import Coded
from ..blocks.weight.taskvector import TaskVector
from ..core.errors import ConfigError, FormatError, nearest
from ..formats.safe import laid_out
from ..methods.lifecycle.compeft import Compeft

Content = dict[str, Tensor]
CODINGS = ("none", "bf16", "8bit", "signs")
_SIGNS = Compeft()
_MARK = "burnish"


def check_coding(coding: str, changes: bool) -> str:
    """Raises ConfigError for an unknown coding, and for one of changes where there is no start."""
    if coding not in CODINGS:
        raise ConfigError(f"no coding {coding!r}{nearest(coding, CODINGS)}; there are "
                          f"{', '.join(CODINGS)}")
    if coding == "signs" and not changes:
        raise ConfigError("signs code changes of what both sides hold, and these tensors have no "
                          "such start (what a server sends, and the factors of a fresh adapter): "
                          "take bf16 or 8bit")
    return coding


def pack(content: Mapping[str, Tensor], coding: str = "none",
         like: Mapping[str, Tensor] | None = None) -> bytes:
    """The bytes of a message. Raises ConfigError for numbers that are not finite."""
    check_coding(coding, like is not None)
    bad = next((n for n, t in content.items()
                if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad is not None:
        raise ConfigError(f"{bad} holds numbers that are not finite; it is not sent")
    held = {n: t.detach().cpu() for n, t in content.items()}
    told: dict[str, Any] = {"coding": coding}
    if coding != "none":
        held, more = _coded(held, coding, {} if like is None else like)
        told |= more
    stored, aliases = laid_out(held)
    stored |= {n: stored[of].clone() for n, of in aliases.items()}     # a message has no aliases
    return save(stored, {_MARK: json.dumps(told, sort_keys=True)})


def unpack(message: bytes, like: Mapping[str, Tensor] | None = None) -> Content:
    """The tensors of a message, by name in order. Raises FormatError for bytes that are none."""
    try:
        size = int.from_bytes(message[:8], "little")
        told = json.loads(json.loads(message[8:8 + size])["__metadata__"][_MARK])
        held = load(message)
        if told["coding"] != "none":
            held = _decoded(held, told, {} if like is None else like)
        return dict(sorted(held.items()))
    except FormatError:
        raise
    except Exception as e:                           # whatever bytes of others may cause
        raise FormatError(f"these {len(message)} bytes are no message of a federation "
                          f"({type(e).__name__})") from None


def _coded(held: Content, coding: str, like: Mapping[str, Tensor]
           ) -> tuple[Content, dict[str, Any]]:
    out: Content = {n: t for n, t in held.items() if not t.is_floating_point()}
    change = {n: t.float() - like[n].cpu().float() if n in like else t.float()
              for n, t in held.items() if t.is_floating_point()}
    if coding == "bf16":
        return out | {n: t.bfloat16() for n, t in change.items()}, {}
    if coding == "8bit":
        block = Block8()
        for name, t in change.items():
            parts = block.empty(t.numel(), True, t.device)
            if t.numel():
                block.write(parts, 0, t.numel(), t.reshape(-1))
            out |= {f"{name}:codes": parts["codes"].view(t.shape),
                    f"{name}:absmax": parts["absmax"]}
        return out, {}
    change = {n: t.contiguous() for n, t in sorted(change.items())}
    task = TaskVector({n: torch.zeros_like(t) for n, t in change.items()}, change)
    coded = _SIGNS.encode(task)
    out |= {n: held[n] for n in change if n not in task.shapes}         # without entries
    return out | {f":{n}": t for n, t in coded.tensors.items()}, \
        {"told": coded.told, "shapes": {n: list(s) for n, s in task.shapes.items()}}


def _decoded(held: Content, told: Mapping[str, Any], like: Mapping[str, Tensor]) -> Content:
    coding, change = check_coding(told["coding"], True), dict[str, Tensor]()
    out: Content = {}
    if coding == "bf16":
        change = {n: t.float() for n, t in held.items() if t.dtype == torch.bfloat16}
        out = {n: t for n, t in held.items() if n not in change}
    elif coding == "8bit":
        block = Block8()
        for name, t in held.items():
            if name.endswith(":codes"):
                parts = {"codes": t.reshape(-1), "absmax": held[f"{name[:-6]}:absmax"]}
                change[name[:-6]] = block.read(parts, 0, t.numel()).view(t.shape) if t.numel() \
                    else torch.zeros(t.shape)
            elif not name.endswith(":absmax"):
                out[name] = t
    else:
        shapes = {n: torch.Size(s) for n, s in told["shapes"].items()}
        task = _SIGNS.decode(Coded({n[1:]: t for n, t in held.items() if n.startswith(":")},
                                   told["told"]), shapes)
        change = {n: task.values(n).view(s) for n, s in shapes.items()}
        out = {n: t for n, t in held.items() if not n.startswith(":")}
    return out | {n: t + like[n].cpu().float() if n in like else t for n, t in change.items()}
