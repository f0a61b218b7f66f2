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

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, FormatError
from ..core.patterns import Pattern
from ..core.reading import shown
from . import peft_settings, safe, staged
from .claim import Inputs
from .folder import CONFIG, TENSORS, finite
from .peft_experts import Stack
from .peft_forms import OF_KIND, TOKENS
from .peft_own import BIAS, Form, Own, plain_bias, sort_out
from .peft_settings import PROMPTS

PREFIX = "base_model.model."
_ROWS, _NORM = "prompt_embeddings", ".ln_tuning_layers."
#: where PEFT keeps the tokens that train beside a LoRA
_BESIDE = "token_adapter."


@dataclass
class Lora:
    """One module: ``scale B A`` on its (out, in) matrix. A (rank, in), B (out, rank)."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    kind: str = "linear"                       # "linear", "embedding" or "conv"
    magnitude: Tensor | None = None            # DoRA: (out,)
    kernel: tuple[int, ...] = ()               # conv: what A's columns unflatten to

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass
class PeftFolder:
    """What a folder says.

    kind: "LORA", "MISS", or one of peft_forms.py (`own` then, with the `settings` of all and what
    stands `beside` the modules; read from a file, its `form` and `config`). whole: parameter ->
    value, trained outright; saved: the modules that own them; norms: those that are the adapter
    itself (LN_TUNING). experts: parameter -> its update; pairs: of a file, factors whose place only
    the model tells (`target_parameters`). prompt: rows before the input. mini: MISS blocks repeat.
    minor: a LoRA whose B is frozen (MiCA).
    """

    kind: str = "LORA"
    loras: dict[str, Lora] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    experts: dict[str, Stack] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)       # MISS: module -> (rank, width)
    own: dict[str, Own] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    form: Form | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    prompt: Tensor | None = None
    whole: dict[str, Tensor] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    mini: bool = False
    minor: bool = False
    bias: str = "none"
    rslora: bool = False
    dropout: float = 0.0
    base: str = ""
    task_type: str | None = None
    fan_in_fan_out: bool = False

    @property
    def modules(self) -> list[str]:
        return [*self.loras, *self.blocks, *self.own, *self.norms]

    @property
    def adapted(self) -> list[str]:
        """The modules that the type itself is about, without tokens beside a LoRA."""
        return [p for p in self.modules if self.kind != "LORA" or p not in self.own]


# -- reading --------------------------------------------------------------------------------
def read(folder: str | Path) -> PeftFolder:
    """Raises FormatError, one line: missing, foreign or truncated files, pickles, settings or
    tensors that have no counterpart here."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
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
        _read_prompt(out, tensors, config, folder)
    elif kind == "LN_TUNING":
        _read_norms(out, tensors, folder)
    elif form is not None:
        _read_own(out, form, tensors, config, folder)
    else:
        {"LORA": _read_lora, "MISS": _read_miss}[kind](out, tensors, config, folder)
    bare = form is not None and form.bare and out.beside
    if not out.modules and not out.pairs and out.prompt is None and not bare:
        raise FormatError(f"{folder} holds no adapter tensor")
    return out


def form_of(kind: Any, config: Mapping[str, Any], folder: Path) -> Form | None:
    """The row of the table that a folder is of; None for LoRA and MiSS, which are no row.

    Raises FormatError for a type that cannot be read."""
    if kind in ("LORA", "LN_TUNING", *PROMPTS) \
            or kind == "MISS" and config.get("init_weights") != "bat":
        return None
    if not isinstance(kind, str) or kind not in OF_KIND:
        known = ", ".join(sorted({"MISS", "LN_TUNING", *PROMPTS, *OF_KIND}))
        raise FormatError(f"{folder} holds a PEFT adapter of type {shown(kind)}; LORA (rsLoRA and "
                          f"DoRA with it), {known} can be read")
    return OF_KIND[kind]


_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A",
          ".lora_embedding_B": "B", ".lora_magnitude_vector": "m",
          ".lora_magnitude_vector.weight": "m"}


def _read_lora(out: PeftFolder, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
               folder: Path) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    asked, out.config = config.get("trainable_token_indices"), config
    out.minor = str(config.get("init_lora_weights")).lower() == "mica"
    rows = f".{_BESIDE}{next(iter(TOKENS.tensors))}"
    for key, value in tensors.items():
        name = _strip(key, folder)
        if name.endswith(rows) and asked:
            path = name.removesuffix(rows)
            out.own[path] = TOKENS.take({rows.rpartition(".")[2]: value},
                                        {"token_indices": _ids(asked, path)}, f"{folder}: {path}")
            continue
        suffix = next((s for s in _PARTS if name.endswith(s)), None)
        if suffix is None:
            if ".lora_" in name:
                raise FormatError(f"{folder}: tensor {key!r} has no counterpart in burnish")
            _keep(out, name, value)
            continue
        path = name.removesuffix(suffix)
        found.setdefault(path, {})[_PARTS[suffix]] = value
        if "embedding" in suffix:
            kinds[path] = "embedding"
    for path, parts in found.items():
        if "A" not in parts or "B" not in parts:
            raise FormatError(f"{folder}: {path} has only one of its two factors")
        A, B = parts["A"], parts["B"]
        kernel = tuple(A.shape[1:]) if A.dim() > 2 else ()
        kind = "conv" if kernel else kinds.get(path, "linear")
        if A.dim() < 2 or B.dim() < 2 or not A.numel() or not B.numel() or not (
                A.is_floating_point() and B.is_floating_point()):
            raise FormatError(f"{folder}: {path} has factors {A.dtype} {list(A.shape)} and "
                              f"{B.dtype} {list(B.shape)}")
        A, B = A.flatten(1), B.flatten(1)
        if A.shape[0] != B.shape[1]:
            raise FormatError(f"{folder}: {path} has factors {list(A.shape)} and {list(B.shape)}")
        if config.get("target_parameters") and not kernel and path not in kinds:
            out.pairs[path] = A, B
            continue
        scale = scale_of(out, path, A.shape[0], folder)
        m = parts.get("m")
        if bool(config.get("use_dora")) != (m is not None):
            raise FormatError(f"{folder}: use_dora is {config.get('use_dora')} but {path} has "
                              f"{'a' if m is not None else 'no'} magnitude")
        out.loras[path] = Lora(A, B, scale, kind, None if m is None else m.flatten(), kernel)
    if asked and not out.own or out.own and not found:
        raise FormatError(f"{folder}: " + ("trainable_token_indices names tokens, and no tensor "
                                           "has their rows" if found else "it holds no factors"))


def scale_of(out: PeftFolder, name: str, rank: int, folder: str | Path) -> float:
    """The factor of an update, by the settings. Raises FormatError where they have another rank."""
    config = out.config
    if (said := _pattern(config.get("rank_pattern"), name, config.get("r") or rank)) != rank:
        raise FormatError(f"{folder}: {name} has rank {rank}, its settings say {said}")
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if out.rslora else rank))


def _keep(out: PeftFolder, name: str, value: Tensor) -> None:
    """What is no adapter's: it trained outright."""
    if own := name if out.bias == "none" else plain_bias(name):
        out.whole[own] = value


def _ids(asked: Any, path: str) -> list[Any]:
    """PEFT's rule: a list is of the embedding; a mapping's keys are names, or their ends."""
    found = asked if isinstance(asked, list) else next(
        (v for k, v in asked.items() if path == k or path.endswith(f".{k}")), []) \
        if isinstance(asked, dict) else []
    return found if isinstance(found, list) else []


def _read_miss(out: PeftFolder, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
               folder: Path) -> None:
    for key, value in tensors.items():
        name = _strip(key, folder)
        if name.endswith(".miss_block"):
            if value.dim() != 2 or not value.numel() or not value.is_floating_point():
                raise FormatError(f"{folder}: {name} is {value.dtype} {list(value.shape)}; "
                                  "expected a matrix")
            if (r := config.get("r") or value.shape[0]) != value.shape[0]:
                raise FormatError(f"{folder}: {name} has rank {value.shape[0]}, its settings say "
                                  f"{r}")
            out.blocks[name.removesuffix(".miss_block")] = value
        else:
            _keep(out, name, value)


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
            inside[_strip(key, folder)] = t
        elif leaf not in out.beside or not torch.equal(t, out.beside[leaf]):
            raise FormatError(f"{folder}: {key} is not base_model.{leaf}, which all modules read")
    found, rest = sort_out(form, inside)
    for name, value in rest.items():
        _keep(out, name, value)
    out.form, out.config = form, config
    for path, parts in found.items():
        said = {n: _pattern(config.get(where), path, config.get(n))
                for n, where in form.patterned.items()}
        if "r" in said and isinstance(said["r"], float):
            said["r"] = int(said["r"])
        out.own[path] = form.take(parts, {**config, **said}, f"{folder}: {path}")
    form.all_read(out.own, config)


def _read_norms(out: PeftFolder, tensors: Mapping[str, Tensor], folder: Path) -> None:
    for key, value in tensors.items():
        name = _strip(key, folder)
        path, found, leaf = name.rpartition(_NORM)
        if found and path not in out.norms:
            out.norms.append(path)
        out.whole[f"{path}.{leaf}" if found else name] = value


def _read_prompt(out: PeftFolder, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
                 folder: Path) -> None:
    if (rows := tensors.get(_ROWS)) is None or rows.dim() != 2 or not rows.numel() \
            or not rows.is_floating_point():
        said = "nothing" if rows is None else f"{rows.dtype} {list(rows.shape)}"
        raise FormatError(f"{folder}: {_ROWS} should be a matrix, a row for each token, got {said}")
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise FormatError(f"{folder} has rows for an encoder and a decoder; burnish puts them "
                          "before the encoder alone")
    if (n := config.get("num_virtual_tokens") or len(rows)) != len(rows):
        raise FormatError(f"{folder}: {_ROWS} has {len(rows)} rows, its settings say {n}")
    out.prompt = rows
    for key, value in tensors.items():           # no tuner wraps the base: one name less in front
        if key != _ROWS:
            out.whole[key.removeprefix("base_model.")] = value


def _strip(key: str, folder: Path) -> str:
    if not key.startswith(PREFIX):
        raise FormatError(f"{folder}: tensor {key!r} is not named as PEFT names them "
                          f"({PREFIX}...)")
    return key.removeprefix(PREFIX)


def _pattern(patterns: Mapping[str, float] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a pattern, matches the end of the module's name."""
    for key, value in (patterns or {}).items():
        try:
            found = Pattern(rf"(?:.*\.)?(?:{key})$").match(path)
        except ConfigError as e:
            raise FormatError(f"pattern {shown(key, 60)} of alpha or rank: {e}") from None
        if found:
            return value
    return default


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
    if what.kind == "LORA":
        config |= _lora_config(what)
        for path, lora in what.loras.items():
            tensors |= _lora_tensors(PREFIX + path, lora)
        if what.experts:
            config["target_parameters"] = sorted(what.experts)
            tensors |= {PREFIX + n: t for s in what.experts.values()
                        for n, t in s.tensors().items()}
        if what.own:
            config["trainable_token_indices"] = {p: o.settings["token_indices"]
                                                 for p, o in what.own.items()}
        tensors |= {f"{PREFIX}{p}.{_BESIDE}{n}": t for p, own in what.own.items()
                    for n, t in own.tensors.items()}
    elif what.kind in PROMPTS:
        config |= what.settings
        tensors[_ROWS] = what.prompt
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


def _lora_config(what: PeftFolder) -> dict[str, Any]:
    def alpha(x: Lora | Stack) -> float:
        value = x.scale * (math.sqrt(x.rank) if what.rslora else x.rank)
        near = round(value)
        return near if abs(value - near) < 1e-9 * max(1.0, abs(value)) else value

    each: dict[str, Lora | Stack] = {**what.loras, **what.experts}
    ranks = Counter(x.rank for x in each.values())
    rank = ranks.most_common(1)[0][0]
    alphas = Counter(alpha(x) for x in each.values())
    common = alphas.most_common(1)[0][0]
    return {
        "r": rank, "lora_alpha": common, "lora_dropout": what.dropout,
        "rank_pattern": {f"^{re.escape(p)}": x.rank for p, x in each.items() if x.rank != rank},
        "alpha_pattern": {f"^{re.escape(p)}": alpha(x) for p, x in each.items()
                          if alpha(x) != common},
        "use_rslora": what.rslora, "init_lora_weights": "mica" if what.minor else True,
        "use_dora": any(x.magnitude is not None for x in what.loras.values()),
        "fan_in_fan_out": what.fan_in_fan_out,
    }


def _lora_tensors(path: str, x: Lora) -> dict[str, Tensor]:
    A, B = x.A, x.B
    if x.kind == "embedding":
        out = {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B}
    else:
        if x.kind == "conv":
            A, B = A.unflatten(1, x.kernel), B.view(*B.shape, *([1] * (len(x.kernel) - 1)))
        out = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    if x.magnitude is not None:
        m = x.magnitude
        if x.kind == "conv":
            m = m.view(1, -1, *([1] * (len(x.kernel) - 1)))
        out[f"{path}.lora_magnitude_vector"] = m
    return out


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
