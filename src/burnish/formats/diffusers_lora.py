"""LoRA as diffusers keeps it beside a pipeline: written without it (diffusers_files.py reads it).

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

from ..core.denoisers import is_denoiser, part_of
from ..core.errors import FormatError
from ..engine.tuned import Tuned
from . import peft_lora, safe, staged
from .claim import Inputs
from .diffusers_files import FILE
from .peft import collected
from .peft_folder import PeftFolder
from .served import alike

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
