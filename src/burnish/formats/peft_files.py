"""The PEFT adapter folder as data: read and written without the `peft` package.

    adapter_config.json        peft_type, r, lora_alpha, target_modules, rank_pattern ...
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight        (rank, in)
                               base_model.model.<module>.lora_B.weight        (out, rank)
                               base_model.model.<module>.lora_embedding_A     (rank, vocabulary)
                               base_model.model.<module>.lora_embedding_B     (width, rank)
                               base_model.model.<module>.lora_magnitude_vector  (out,)
                               base_model.model.<module>.miss_block           (rank, out)
                               base_model.model.<module>.<parameter>          a module saved whole

Convolutions keep their kernel in A and ones in B; here all are matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FormatError
from ..core.reading import shown
from . import diffusers_files, peft_lora, peft_prompts, peft_settings, safe, staged
from .claim import Inputs
from .folder import CONFIG, TENSORS, finite
from .peft_folder import PREFIX, PeftFolder, keep, pattern, strip
from .peft_forms import OF_KIND
from .peft_own import BIAS, HERE, Form, sort_out
from .peft_prompts import PROMPTS
from .peft_settings import UNREAD
from .peft_variants import variant_of

_NORM = ".ln_tuning_layers."


# -- reading --------------------------------------------------------------------------------
def read(folder: str | Path) -> PeftFolder:
    """Raises FormatError, one line: missing, foreign or truncated files, pickles, settings or
    tensors that have no counterpart here."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
        if diffusers_files.there(folder):
            return diffusers_files.read(folder)
        raise FormatError(f"{folder} is no PEFT folder: it has no {CONFIG}")
    config = safe.read_json(folder / CONFIG, finite=True)
    if config.get("library") == "burnish":
        raise FormatError(f"{folder} was written by burnish; read it with "
                          "burnish.load(model, folder)")
    kind = config.get("peft_type")
    form = form_of(kind, config, folder)
    peft_settings.check(config, form, folder)
    if not (folder / TENSORS).is_file() and (folder / "adapter_model.bin").exists():
        raise FormatError(f"{folder}/adapter_model.bin may hold a pickle and is not opened; "
                          "let peft save it again with safe_serialization=True")
    tensors = safe.load_file(folder / TENSORS)
    for name, t in tensors.items():
        if not finite(t):
            raise FormatError(f"{folder / TENSORS}: {name} holds NaN or infinite values")
    out = PeftFolder(kind, rslora=bool(config.get("use_rslora")),
                     dropout=float(config.get("lora_dropout") or config.get("miss_dropout") or 0),
                     base=config.get("base_model_name_or_path") or "",
                     task_type=config.get("task_type"),
                     saved=list(config.get("modules_to_save") or []),
                     mini=config.get("init_weights") == "mini",
                     bias=config.get("bias") or "none",
                     fan_in_fan_out=bool(config.get("fan_in_fan_out")))
    if kind in PROMPTS:
        peft_prompts.read(out, tensors, config, folder)
    elif kind == "LN_TUNING":
        _read_norms(out, tensors, folder)
    elif form is not None:
        _read_own(out, form, tensors, config, folder)
    else:
        {"LORA": peft_lora.read, "MISS": _read_miss}[kind](out, tensors, config, folder)
    bare = form is not None and form.bare and out.beside
    if not out.modules and not out.pairs and out.prompt is None and not bare:
        raise FormatError(f"{folder} holds no adapter tensor")
    return out


def form_of(kind: Any, config: Mapping[str, Any], folder: Path) -> Form | None:
    """The row of the tables that a folder is of; None for LoRA and MiSS, which are no row.

    Raises FormatError for a type that cannot be read."""
    if kind == "LORA":
        return variant_of(config, str(folder))
    if kind in ("LN_TUNING", *PROMPTS) \
            or kind == "MISS" and config.get("init_weights") != "bat":
        return None
    if not isinstance(kind, str) or kind not in OF_KIND:
        known = ", ".join(sorted({"MISS", "LN_TUNING", *PROMPTS, *OF_KIND}))
        why = f": {UNREAD[kind]}" if isinstance(kind, str) and kind in UNREAD else ""
        raise FormatError(f"{folder} holds a PEFT adapter of type {shown(kind)}{why}; LORA (rsLoRA "
                          f"and DoRA with it), {known} can be read")
    return OF_KIND[kind]


def _read_miss(out: PeftFolder, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
               folder: Path) -> None:
    for key, value in tensors.items():
        name = strip(key, folder)
        if name.endswith(".miss_block"):
            if value.dim() != 2 or not value.numel() or not value.is_floating_point():
                raise FormatError(f"{folder}: {name} is {value.dtype} {list(value.shape)}; "
                                  "expected a matrix")
            if (r := config.get("r") or value.shape[0]) != value.shape[0]:
                raise FormatError(f"{folder}: {name} has rank {value.shape[0]}, its settings say "
                                  f"{r}")
            out.blocks[name.removesuffix(".miss_block")] = value
        else:
            keep(out, name, value)


def _read_own(out: PeftFolder, form: Form, tensors: Mapping[str, Tensor],
              config: Mapping[str, Any], folder: Path) -> None:
    beside = form.stands_beside(k.removeprefix("base_model.") for k in tensors)
    for leaf, held in beside.items():
        if (t := tensors.get(f"base_model.{leaf}")) is None:
            continue
        if t.dim() not in held.dims or not t.numel() or t.is_floating_point() == held.whole:
            raise FormatError(f"{folder}: {leaf} is {t.dtype} {list(t.shape)}")
        out.beside[leaf] = t
    inside: dict[str, Tensor] = {}
    for key, t in tensors.items():               # some versions write them once more per module
        leaf = key.rpartition(".")[2]
        if key.removeprefix("base_model.") in out.beside:
            continue
        if leaf not in form.beside:
            inside[strip(key, folder)] = t
        elif leaf not in out.beside or not torch.equal(t, out.beside[leaf]):
            raise FormatError(f"{folder}: {key} is not base_model.{leaf}, which all modules read")
    found, rest = sort_out(form, inside)
    for name, value in rest.items():
        keep(out, name, value)
    out.form, out.config = form, config
    for path, parts in found.items():
        said = {n: pattern(config.get(where), path, config.get(n))
                for n, where in form.patterned.items()}
        if "r" in said and isinstance(said["r"], float):
            said["r"] = int(said["r"])
        out.own[path] = form.take(parts, {**config, **said, HERE: path}, f"{folder}: {path}")
    form.all_read(out.own, config)


def _read_norms(out: PeftFolder, tensors: Mapping[str, Tensor], folder: Path) -> None:
    for key, value in tensors.items():
        name = strip(key, folder)
        path, found, leaf = name.rpartition(_NORM)
        if found and path not in out.norms:
            out.norms.append(path)
        out.whole[f"{path}.{leaf}" if found else name] = value


# -- writing --------------------------------------------------------------------------------
def write(folder: str | Path, what: PeftFolder, names: Iterable[str],
          card: str | None = None, inputs: Inputs = ()) -> Path:
    """Write a folder `peft` loads. names: every module name of the model, so that the targets
    written match these modules and no others. inputs: what must not be written over (the base is
    always among it). An older folder is replaced as a whole, if burnish wrote all of it.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {
        "peft_type": what.kind, "task_type": what.task_type,
        "base_model_name_or_path": what.base or None, "revision": None, "inference_mode": True,
        "target_modules": targets(set(what.adapted), list(names)) if what.adapted else None,
        "bias": what.bias,
        "modules_to_save": _modules_to_save(what.saved, list(names)),
    }
    if what.plain_lora:
        config |= peft_lora.config_of(what)
        for path, lora in what.loras.items():
            tensors |= peft_lora.tensors_of(PREFIX + path, lora)
        if what.experts:
            config["target_parameters"] = sorted(what.experts)
            tensors |= {PREFIX + n: t for s in what.experts.values()
                        for n, t in s.tensors().items()}
        if what.own:
            config["trainable_token_indices"] = {p: o.settings["token_indices"]
                                                 for p, o in what.own.items()}
        tensors |= {f"{PREFIX}{p}.{peft_lora.BESIDE}{n}": t for p, own in what.own.items()
                    for n, t in own.tensors.items()}
    elif what.kind in PROMPTS:
        config |= what.settings
        tensors |= {peft_prompts.ROWS: what.prompt, **what.beside}
    elif what.kind == "LN_TUNING":
        pass
    elif what.own:
        config |= what.settings
        tensors |= {f"{PREFIX}{p}.{n}": t for p, own in what.own.items()
                    for n, t in own.tensors.items()}
        tensors |= {f"base_model.{n}": t for n, t in what.beside.items()}
    else:
        rank, width = next(iter(what.blocks.values())).shape
        config |= {"r": rank, "miss_dropout": what.dropout, "mini_r": width if what.mini else 1,
                   "init_weights": "mini" if what.mini else True}
        tensors |= {f"{PREFIX}{p}.miss_block": D for p, D in what.blocks.items()}
    if what.spans is not None:
        config["layer_replication"] = what.spans
    for n, t in what.whole.items():
        path, _, leaf = n.rpartition(".")
        inside = f"{path}{_NORM}{leaf}" if path in what.norms else \
            f"{path}{BIAS}" if what.bias != "none" and path in what.adapted else n
        tensors[("base_model." if what.kind in PROMPTS else PREFIX) + inside] = t
    with staged.replace(folder, "peft", [("the base model", what.base), *inputs]) as new:
        safe.save_file(tensors, new / TENSORS)
        if card is not None:
            safe.write_text(new / "README.md", card)
        safe.write_json(new / CONFIG, config)
    return folder


def targets(wanted: set[str], names: list[str]) -> list[str] | str:
    """The shortest target_modules that PEFT's rule (a name or its dotted end) resolves to
    exactly `wanted`: last names, else full names, else a pattern."""
    for tries in ({w.rpartition(".")[2] for w in wanted}, wanted):
        if {n for n in names if n in tries or any(n.endswith(f".{t}") for t in tries)} == wanted:
            return sorted(tries)
    return "^(" + "|".join(re.escape(w) for w in sorted(wanted)) + ")$"


def _modules_to_save(saved: list[str], names: list[str]) -> list[str] | None:
    """PEFT finds these modules by the end of their name: nothing else may end like them."""
    for module in saved:
        others = [n for n in names if n.endswith(module) and n not in saved]
        if others or not module:
            raise FormatError(f"PEFT cannot save {module or 'the root'!r} alone: it goes by the "
                              f"end of the name and would take {(others or ['all'])[0]!r} too")
    return saved or None
