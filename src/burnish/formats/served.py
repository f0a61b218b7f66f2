"""Adapters for programs that serve them: vLLM, SGLang, llama.cpp and MLX.

A server reads less of a folder than PEFT does: one rank and one scale for all modules, no
magnitude, no module saved whole, no table of tokens. What it does not read it refuses, or leaves
out in silence and answers with the base. So a folder is made that it reads in full, and what has no
place there is refused by name.

    one rank     factors of a smaller one get rows and columns of noughts; the product is the same
    one scale    where scales differ, or their product with the rank is no whole number, B takes
                 its own: in float32, one rounding of an entry

Where the rules are from (none of these programs is installed with burnish, so none was run; vLLM's
sizes and mlx-lm's keys were looked up, SGLang's and llama.cpp's rules are unconfirmed):
vLLM, ``vllm/lora/peft_helper.py`` and ``lora_model.py``: ``modules_to_save`` and ``use_dora`` are
refused, ``r`` and ``lora_alpha`` are of all modules (patterns are not read), ``r`` is at most
``--max-lora-rank``, one of a few sizes. SGLang, ``srt/lora/lora_config.py``: ``r``, ``lora_alpha``
and a list of ``target_modules``, scaled by ``lora_alpha / r`` whatever ``use_rslora`` says.
llama.cpp, ``convert_lora_to_gguf.py``: ``lora_alpha`` alone, over each tensor's own rank; tables of
tokens, magnitudes and whole modules are errors. mlx-lm, ``tuner/utils.py`` (``load_adapters``,
``linear_to_lora_layers``) and ``tuner/lora.py``: see :func:`_mlx`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FormatError, nearest
from ..core.outputs import base_class
from ..engine.tuned import Tuned
from . import peft_files, safe, staged
from .folder import CONFIG
from .peft import collected
from .peft_folder import Lora, PeftFolder

#: the linear layers that all of them look for, by the names that Llama and its kin give them
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj",
          "gate_up_proj")
#: model types that all of them have under these names
TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite", "olmo2",
         "smollm3")
#: what vLLM's --max-lora-rank may be
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_OUT = "burnish merge folds it into plain weights, which every server takes"


@dataclass(frozen=True)
class Served:
    """What was written. rank, scale: of all modules. commands: what to type, in order. folded:
    modules whose B took their scale; errors: relative errors of what was approximated."""

    folder: Path
    reader: str
    rank: int
    scale: float
    modules: tuple[str, ...]
    commands: tuple[str, ...]
    folded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"output": str(self.folder), "format": self.reader, "rank": self.rank,
                "scale": self.scale, "modules": list(self.modules),
                "commands": list(self.commands), "folded": list(self.folded),
                "notes": list(self.notes), "errors": self.errors}

    def __str__(self) -> str:
        leaves = ", ".join(dict.fromkeys(m.rpartition(".")[2] for m in self.modules))
        lines = [f"written to {self.folder}, for {self.reader}: rank {self.rank}, scale "
                 f"{self.scale:g}, {len(self.modules)} modules ({leaves})", *(
                     f"note: {n}" for n in self.notes)]
        return "\n".join([*lines, "then:", *(s for c in self.commands for s in shell(c))])


@torch.no_grad()
def export_served(tuned: Tuned, folder: str | Path, reader: str, *, base: str | None = None,
                  name: str | None = None, rank: int | None = None) -> Served:
    """Write an adapter of a language model as `reader` reads it, and say what to type then.

    reader: one of :data:`READERS`.  base: name or folder of the served model; default what `tuned`
    says.  name: which adapter, default what is active.  rank: as for :func:`burnish.export_peft`.

    Raises FormatError for parts of the recipe, modules and models that `reader` has no place for.
    """
    if reader not in READERS:
        raise FormatError(f"{reader!r} is no reader; expected one of {', '.join(READERS)}"
                          f"{nearest(reader, READERS)}")
    what, errors = collected(tuned, name, rank, pairs=True)
    _check(tuned, what, reader)
    loras, size, scale, folded = alike(what.loras, whole=reader != "mlx")
    kept = replace(what, loras=loras, dropout=0.0, rslora=False, minor=False, velora=None,
                   base=base or what.base, task_type="CAUSAL_LM")
    notes = _notes(tuned, errors, folded, reader)
    served = Served(Path(folder), reader, size, scale, tuple(loras), (), tuple(folded),
                    tuple(notes), errors)
    served = replace(served, commands=READERS[reader](served, kept.base or "BASE"))
    if reader == "mlx":
        _mlx(tuned, kept, served)
        return served
    names = [n for n, _ in tuned.model.named_modules() if ".burnish" not in f".{n}"]
    if isinstance(peft_files.targets(set(kept.loras), names), str):
        raise FormatError(f"{reader} wants the names of the modules in a list, and none finds "
                          f"these alone; {_OUT}")
    peft_files.write(folder, kept, names, _card(served, kept.base))
    return served


def alike(loras: dict[str, Lora], whole: bool = True
          ) -> tuple[dict[str, Lora], int, float, list[str]]:
    """(the same updates with one rank and one scale, the rank, the scale, whose B was scaled).

    whole: the scale times the rank (``lora_alpha``) has to be a whole number.
    """
    rank = max(x.rank for x in loras.values())
    scales = {x.scale for x in loras.values()}
    alpha = min(scales) * rank
    kept = len(scales) == 1 and (not whole or abs(alpha - round(alpha)) < 1e-9 * max(1.0, alpha))
    scale = min(scales) if kept else 1.0
    out: dict[str, Lora] = {}
    folded = [] if kept else [p for p, x in loras.items() if x.scale != 1.0]
    for path, x in loras.items():
        B = x.B if path not in folded else (x.B.double() * x.scale).float()
        out[path] = replace(x, A=_longer(x.A, rank, 0), B=_longer(B, rank, 1), scale=scale)
    return out, rank, scale, folded


def _longer(t: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim).contiguous()


def _check(tuned: Tuned, what: PeftFolder, reader: str) -> None:
    """Raises FormatError with the first thing that has no place."""
    kind = base_class(tuned.model).__name__
    if not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise FormatError(f"{reader} serves adapters of language models, and this is of {kind}; "
                          f"{_OUT}")
    if moved := sorted(p for p, x in what.loras.items() if x.magnitude is not None):
        raise FormatError(f"{moved[0]} has a magnitude (dora), which {reader} does not read; "
                          f"{_OUT}")
    if moved := sorted(p for p, x in what.loras.items() if x.shift is not None):
        raise FormatError(f"{moved[0]} has a bias of its update (beft, bitfit), which {reader} "
                          f"does not read; {_OUT}")
    if what.experts:
        raise FormatError(f"{sorted(what.experts)[0]} is a stack of experts, and {reader} reads "
                          f"updates of single layers; {_OUT}")
    if what.whole or what.saved or what.own:
        found = sorted([*what.own, *what.saved, *what.whole])[0]
        raise FormatError(f"{found} trains by itself, and {reader} reads pairs of factors alone; "
                          f"{_OUT}")
    for path, x in what.loras.items():
        leaf = path.rpartition(".")[2]
        if x.kind != "linear" or leaf not in LAYERS or ".experts." in path:
            raise FormatError(f"{path} is adapted, and {reader} has no place for it: it finds "
                              f"{', '.join(LAYERS)}. Name those with targets=, or {_OUT}")
        if not path.startswith("model.") and reader == "mlx":
            raise FormatError(f"{path}: mlx-lm has its layers below model.layers; {_OUT}")
    if reader == "mlx" and _type(tuned) not in TYPES:
        raise FormatError(f"the names of {_type(tuned) or kind} in mlx-lm are not known here, and "
                          "it would pass over an adapter with other names in silence; known are "
                          f"{', '.join(TYPES)}; {_OUT}")


def _type(tuned: Tuned) -> str:
    return str(getattr(getattr(tuned.model, "config", None), "model_type", ""))


def _notes(tuned: Tuned, errors: dict[str, float], folded: list[str], reader: str) -> list[str]:
    notes = []
    if errors:
        worst = max(errors, key=lambda n: errors[n])
        notes.append(f"{len(errors)} updates are approximated; the largest relative error is "
                     f"{errors[worst]:.3g}, at {worst}")
    if folded:
        notes.append(f"the scales of {len(folded)} modules are in their B, rounded once")
    held = [m.name for a in tuned.adapters.values() for m in a.recipe if "storage" in m.axes()]
    if held:
        notes.append(f"it was trained over weights held by {held[0]}; over plain weights a server "
                     "answers a little differently")
    if _type(tuned) not in TYPES:
        notes.append(f"that {reader} takes adapters of {_type(tuned) or 'this model'} is "
                     "unconfirmed: compare an answer with the base's")
    return notes


def _card(served: Served, base: str) -> str:
    head = ["---", "library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []),
            "tags:", "- burnish", "---", "", f"An adapter for {served.reader}, made by burnish.",
            "", "```console", *(f"$ {c}" for c in served.commands), "```"]
    return "\n".join(head) + "\n"


# -- MLX --------------------------------------------------------------------------------------
def _mlx(tuned: Tuned, what: PeftFolder, served: Served) -> None:
    """mlx-lm's folder: ``adapters.safetensors`` and ``adapter_config.json``.

        <module>.lora_a   (in, rank)       y = W x + scale (x lora_a) lora_b
        <module>.lora_b   (rank, out)

    ``lora_parameters.keys`` are names within a block, of every one of the last ``num_layers``
    blocks; tensors are looked up without strictness, so that a block whose module stayed as it was
    gets noughts here, not whatever it is made with there.
    """
    blocks: dict[str, dict[str, Lora]] = {}
    for path, x in what.loras.items():
        n, _, key = path.removeprefix("model.layers.").partition(".")
        blocks.setdefault(n, {})[key] = x
    keys = sorted({k for block in blocks.values() for k in block})
    modules = dict(tuned.model.named_modules())
    depth = int(tuned.model.config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for n in range(depth):
        for key in keys:
            path = f"model.layers.{n}.{key}"
            x = blocks.get(str(n), {}).get(key)
            if x is None and path in modules:
                one = next(b[key] for b in blocks.values() if key in b)
                x = Lora(torch.zeros_like(one.A), torch.zeros_like(one.B))
            if x is not None:
                tensors[f"{path}.lora_a"] = x.A.mT.contiguous()
                tensors[f"{path}.lora_b"] = x.B.mT.contiguous()
    config = {"fine_tune_type": "lora", "model": what.base or None, "num_layers": depth,
              "lora_parameters": {"rank": served.rank, "scale": served.scale, "dropout": 0.0,
                                  "keys": keys}}
    with staged.replace(served.folder, "mlx", [("the base model", what.base)]) as new:
        safe.save_file(tensors, new / "adapters.safetensors")
        safe.write_json(new / CONFIG, config)
        safe.write_text(new / "README.md", _card(served, what.base))


# -- what to type -----------------------------------------------------------------------------
def shell(command: str, width: int = 76) -> list[str]:
    """A command over several lines, which a shell reads as one; a flag stays with its value."""
    groups: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        value = bool(groups) and groups[-1].startswith("-") and " " not in groups[-1]
        if groups and not word.startswith("-") and (
                value or len(groups[-1]) + len(word) + 1 <= width):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) + 1 <= width:
            lines[-1] += f" {group}"
        else:
            lines.append(f"    {group}")
    return [f"  {line}" + " \\" * (n < len(lines)) for n, line in enumerate(lines, 1)]


def _called(folder: Path) -> str:
    name = folder.resolve().name
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name) or "tuned"


def _vllm(served: Served, base: str) -> tuple[str, ...]:
    if served.rank > RANKS[-1]:
        raise FormatError(f"vllm takes ranks up to {RANKS[-1]}, this adapter has {served.rank}; "
                          f"{_OUT}")
    most = next(r for r in RANKS if r >= served.rank)
    called = _called(served.folder)
    return (f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {most} "
            f"--lora-modules {called}={shlex.quote(str(served.folder))}",
            f"curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
            f"-d '{{\"model\": \"{called}\", \"prompt\": \"...\"}}'")


def _sglang(served: Served, base: str) -> tuple[str, ...]:
    called = _called(served.folder)
    return (f"python -m sglang.launch_server --model-path {shlex.quote(base)} --enable-lora "
            f"--max-lora-rank {served.rank} "
            f"--lora-paths {called}={shlex.quote(str(served.folder))}",
            f"curl localhost:30000/generate -H 'Content-Type: application/json' "
            f"-d '{{\"text\": \"...\", \"lora_path\": \"{called}\"}}'")


def _gguf(served: Served, base: str) -> tuple[str, ...]:
    folder = shlex.quote(str(served.folder))
    where = "--base" if Path(base).is_dir() else "--base-model-id"
    out = shlex.quote(f"{str(served.folder).rstrip('/')}.gguf")
    return (f"python llama.cpp/convert_lora_to_gguf.py {folder} {where} {shlex.quote(base)} "
            f"--outfile {out}",
            f"llama-server -m BASE.gguf --lora {out}")


def _apple(served: Served, base: str) -> tuple[str, ...]:
    return (f"mlx_lm.server --model {shlex.quote(base)} "
            f"--adapter-path {shlex.quote(str(served.folder))}",)


READERS: dict[str, Callable[[Served, str], tuple[str, ...]]] = {
    "vllm": _vllm, "sglang": _sglang, "gguf": _gguf, "mlx": _apple}
