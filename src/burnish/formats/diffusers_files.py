"""LoRA of a pipeline of diffusers, read (the layout: diffusers_lora.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import FormatError
from ..core.reading import plain, shown
from . import peft_lora, safe
from .folder import finite
from .peft_folder import Lora, PeftFolder

FILE = "pytorch_lora_weights.safetensors"
#: where diffusers keeps the settings of what it has written
METADATA = "lora_adapter_metadata"
PARTS = ("unet", "transformer")
_LEAVES = {"A.weight": "A", "B.weight": "B", "B.bias": "shift", "magnitude_vector": "magnitude"}


def there(folder: Path) -> bool:
    """Is it a folder that ``load_lora_weights`` reads?"""
    return (folder / FILE).is_file()


def read(folder: Path) -> PeftFolder:
    """What the file says of the denoiser. Raises FormatError for keys of another program, for
    factors without their partner, and for text encoders, which burnish leaves as they are."""
    path = folder / FILE
    tensors = safe.load_file(path)
    out, pairs = PeftFolder(), {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part.startswith("text_encoder"):
            raise FormatError(f"{path}: {plain(key, 80)} is of a text encoder, and burnish tunes "
                              "the denoiser of a pipeline alone; load it with diffusers")
        module, _, leaf = rest.partition(".lora_")
        if part not in PARTS or leaf not in _LEAVES:
            raise FormatError(f"{path}: {plain(key, 80)} is not named as diffusers names them "
                              "(unet.<module>.lora_A.weight); let load_lora_weights read it and "
                              "save_lora_weights write it again")
        if not finite(value):
            raise FormatError(f"{path}: {plain(key, 80)} holds NaN or infinite values")
        pairs.setdefault(module, {})[_LEAVES[leaf]] = value
    out.config = _settings(path, next((k.partition(".")[0] for k in tensors), "unet"))
    for module, parts in pairs.items():
        out.loras[module] = _lora(parts, f"{path}: {module}")
        if out.config:
            out.loras[module].scale = peft_lora.scale_of(out, module, out.loras[module].rank, path)
    if not out.loras:
        raise FormatError(f"{path} holds no LoRA")
    return out


def _settings(path: Path, part: str) -> dict[str, Any]:
    """PEFT's settings of a part, which newer files hold; {} where alpha is the rank."""
    said = safe.metadata(path).get(METADATA)
    if said is None:
        return {}
    try:
        found = json.loads(said)
        own = {k.removeprefix(f"{part}."): v for k, v in found.items() if k.startswith(f"{part}.")}
    except (ValueError, AttributeError):
        raise FormatError(f"{path}: its {METADATA} is no JSON object: {shown(said, 60)}") from None
    if own.get("use_rslora"):
        raise FormatError(f"{path}: use_rslora has no reader here for files of diffusers")
    return own


def _lora(parts: dict[str, Tensor], at: str) -> Lora:
    if "A" not in parts or "B" not in parts:
        raise FormatError(f"{at} has one factor of two")
    A, B = parts["A"], parts["B"]
    if A.dim() not in (2, 3, 4, 5) or B.dim() != A.dim() or A.shape[0] != B.shape[1] \
            or not A.numel() or B[0, 0].numel() != 1:
        raise FormatError(f"{at}: factors of {list(A.shape)} and {list(B.shape)} do not make an "
                          "update")
    kernel = tuple(A.shape[1:]) if A.dim() > 2 else ()
    magnitude = parts.get("magnitude")
    return Lora(A.flatten(1), B.flatten(1), kind="conv" if kernel else "linear", kernel=kernel,
                magnitude=None if magnitude is None else magnitude.flatten(),
                shift=parts.get("shift"))
