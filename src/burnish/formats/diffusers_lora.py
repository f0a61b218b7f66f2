"""LoRA as diffusers keeps it beside a pipeline: written, and read, without it.

    pytorch_lora_weights.safetensors
        <part>.<module>.lora_A.weight     (rank, in); of a convolution (rank, in, k, k)
        <part>.<module>.lora_B.weight     (out, rank); (out, rank, 1, 1)
        <part>.<module>.lora_magnitude_vector     DoRA: (out,)

`part` is unet or transformer. Programs that read such files take the scale for 1 where nothing is
said, and one rank for all: so the scale is in B, rounded once, and smaller ranks are filled up with
noughts. What other programs have written says its alphas in the file's own metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.denoisers import is_denoiser, part_of
from ..core.errors import FormatError
from ..core.reading import plain, shown
from ..engine.tuned import Tuned
from . import peft_lora, safe, staged
from .claim import Inputs
from .folder import finite
from .peft import collected
from .peft_folder import Lora, PeftFolder
from .served import alike

FILE = "pytorch_lora_weights.safetensors"
#: where diffusers keeps the settings of what it has written
METADATA = "lora_adapter_metadata"
PARTS = ("unet", "transformer")
_OUT = "burnish merge writes a pipeline with it in the weights, which from_pretrained opens"


@dataclass(frozen=True)
class Beside:
    """What was written. errors: relative errors of what was approximated."""

    folder: Path
    base: str
    rank: int
    modules: tuple[str, ...]
    errors: dict[str, float]

    @property
    def commands(self) -> tuple[str, ...]:
        return (f"pipe = DiffusionPipeline.from_pretrained({self.base!r})",
                f"pipe.load_lora_weights({str(self.folder)!r})")

    def to_dict(self) -> dict[str, Any]:
        return {"output": str(self.folder), "format": "diffusers", "file": FILE,
                "rank": self.rank, "modules": list(self.modules), "commands": list(self.commands),
                "errors": self.errors}

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda n: self.errors[n], default=None)
        note = [] if worst is None else [
            f"note: {len(self.errors)} updates are approximated; the largest relative error is "
            f"{self.errors[worst]:.3g}, at {worst}"]
        return "\n".join([f"written to {self.folder / FILE}: rank {self.rank}, "
                          f"{len(self.modules)} modules", *note, "then, in Python:",
                          *(f"  {c}" for c in self.commands)])


@torch.no_grad()
def export_diffusers(tuned: Tuned, folder: str | Path, *, base: str | None = None,
                     name: str | None = None, rank: int | None = None, inputs: Inputs = ()
                     ) -> Beside:
    """Write the LoRA of a denoiser for ``pipe.load_lora_weights(folder)``, which then draws what
    `tuned` draws.

    base: the pipeline's folder.  name: which adapter, default what is active.  rank: as for
    :func:`burnish.export_peft`.

    Raises FormatError for what is no denoiser of diffusers and for parts that are no LoRA.
    """
    if not is_denoiser(tuned.model):
        raise FormatError(f"{type(tuned.model).__name__} is no denoiser of diffusers, and only "
                          "those stand in a pipeline; --for peft writes its adapter")
    try:
        what, errors = collected(tuned, name, rank, pairs=True)
    except FormatError as e:
        raise FormatError(f"{e}; {_OUT}") from None
    _check(what)
    loras, size, scale, _ = alike(what.loras, whole=False)
    part, tensors = part_of(tuned.model), {}
    for path, x in loras.items():
        shift = None if x.shift is None else (x.shift.double() * scale).float()
        x = replace(x, B=(x.B.double() * scale).float(), shift=shift, scale=1.0)
        tensors |= peft_lora.tensors_of(f"{part}.{path}", x)
    base = base or what.base or "PIPELINE"
    with staged.replace(folder, "diffusers", [("the base model", base), *inputs]) as new:
        safe.save_file({k: t.contiguous() for k, t in tensors.items()}, new / FILE)
        safe.write_text(new / "README.md", _card(base, Path(folder)))
    return Beside(Path(folder), base, size, tuple(loras), errors)


def _check(what: PeftFolder) -> None:
    """Raises FormatError with the first thing that is no pair of factors."""
    if what.experts:
        raise FormatError(f"{sorted(what.experts)[0]} is a stack of experts, and diffusers reads "
                          f"updates of single layers; {_OUT}")
    if alone := sorted([*what.own, *what.saved, *what.whole]):
        raise FormatError(f"{alone[0]} trains by itself, and diffusers reads pairs of factors "
                          f"alone; {_OUT}")
    if not what.loras:
        raise FormatError(f"the adapter is no LoRA, which is what diffusers reads; {_OUT}")
    for path, x in what.loras.items():
        if x.kind not in ("linear", "conv"):
            raise FormatError(f"{path} is an embedding, and diffusers reads updates of linear "
                              f"layers and convolutions; {_OUT}")


def _card(base: str, folder: Path) -> str:
    head = ["---", "library_name: diffusers", f"base_model: {json.dumps(base)}", "tags:", "- lora",
            "- text-to-image", "- burnish", "---", "", "LoRA of a pipeline, made by burnish.", "",
            "```python", "from diffusers import DiffusionPipeline", "",
            f"pipe = DiffusionPipeline.from_pretrained({base!r})",
            f"pipe.load_lora_weights({folder.name!r})", "```"]
    return "\n".join(head) + "\n"


# -- reading --------------------------------------------------------------------------------
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


_LEAVES = {"A.weight": "A", "B.weight": "B", "B.bias": "shift", "magnitude_vector": "magnitude"}


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
