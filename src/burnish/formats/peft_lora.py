"""LoRA, rsLoRA and DoRA in a PEFT folder: factors, their scales, and tokens that train beside them.

What PEFT calls LoRA too and is another function has rows of its own (peft_variants.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..blocks.state.gates import Shift
from ..core.errors import ConfigError, FormatError
from ..core.method import Method
from ..core.reading import shown
from ..core.recipe import make
from ..engine.repeat import checked, repeat, repeated
from .peft_experts import Stack
from .peft_folder import Lora, PeftFolder, keep, pattern, strip
from .peft_forms import TOKENS

#: where PEFT keeps the tokens that train beside a LoRA
BESIDE = "token_adapter."
_DIRECTION, _NOISE = ".lora_velora_embed", ".lora_monteclora_sampler."
_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "c",
          ".lora_embedding_A": "A", ".lora_embedding_B": "B", ".lora_magnitude_vector": "m",
          ".lora_magnitude_vector.weight": "m"}


def read(out: PeftFolder, tensors: Mapping[str, Tensor], config: Mapping[str, Any],
               folder: Path) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    asked, out.config = config.get("trainable_token_indices"), config
    out.minor = str(config.get("init_lora_weights")).lower() == "mica"
    rows = f".{BESIDE}{next(iter(TOKENS.tensors))}"
    for key, value in tensors.items():
        name = strip(key, folder)
        if name.endswith(rows) and asked:
            path = name.removesuffix(rows)
            out.own[path] = TOKENS.take({rows.rpartition(".")[2]: value},
                                        {"token_indices": _ids(asked, path)}, f"{folder}: {path}")
            continue
        if name.endswith(_DIRECTION) and config.get("velora_config"):
            continue                             # of the last batch, found anew by the next
        if _NOISE in name and config.get("monteclora_config"):
            continue                             # of training alone
        suffix = next((s for s in _PARTS if name.endswith(s)), None)
        if suffix is None:
            if ".lora_" in name:
                raise FormatError(f"{folder}: tensor {key!r} has no counterpart in burnish")
            keep(out, name, value)
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
            if "c" in parts:
                raise FormatError(f"{folder}: {path} has a bias, and target_parameters have none")
            out.pairs[path] = A, B
            continue
        scale = scale_of(out, path, A.shape[0], folder)
        m = parts.get("m")
        if bool(config.get("use_dora")) != (m is not None):
            raise FormatError(f"{folder}: use_dora is {config.get('use_dora')} but {path} has "
                              f"{'a' if m is not None else 'no'} magnitude")
        c = parts.get("c")
        if bool(config.get("lora_bias")) != (c is not None):
            raise FormatError(f"{folder}: lora_bias is {config.get('lora_bias')} but {path} has "
                              f"{'a' if c is not None else 'no'} bias")
        if c is not None and (kind != "linear" or m is not None or c.shape != B.shape[:1]):
            raise FormatError(f"{folder}: the bias of {path}'s update is {list(c.shape)}, and what "
                              f"it stands beside a {'DoRA' if m is not None else kind} of "
                              f"{len(B)} outputs; expected one for each output of a linear")
        out.loras[path] = Lora(A, B, scale, kind, None if m is None else m.flatten(), kernel, c)
    if asked and not out.own or out.own and not found:
        raise FormatError(f"{folder}: " + ("trainable_token_indices names tokens, and no tensor "
                                           "has their rows" if found else "it holds no factors"))


_VELORA = {"num_groups": "groups", "scale": "scale", "init_type": "init"}
_INITS = {"batch_average": "mean", "random": "random"}


def compressed(config: Mapping[str, Any], folder: str | Path) -> list[Method]:
    """The part that keeps what the down-projections read in fewer numbers, if there is one.
    Raises FormatError."""
    said = config.get("velora_config")
    if not said:
        return []
    if not isinstance(said, dict) or (odd := set(said) - set(_VELORA)):
        odd = min(odd) if isinstance(said, dict) else shown(said)
        raise FormatError(f"{folder}: velora_config: {odd} has no counterpart in burnish")
    init = said.get("init_type", "batch_average")
    if not isinstance(init, str) or init not in _INITS:
        why = ", the direction of a first batch that is gone," if init == "batch_average_once" \
            else ""
        raise FormatError(f"{folder}: velora_config.init_type = {shown(init)}{why} has no "
                          f"counterpart in burnish; expected one of {', '.join(_INITS)}")
    args = {_VELORA[n]: v for n, v in said.items()} | {"init": _INITS[init]}
    if type(args.get("scale")) is int:
        args["scale"] = float(args["scale"])
    return [make("velora", args)]


def as_compressed(method: Method) -> dict[str, Any]:
    """The same as PEFT is told it."""
    said = method.settings()
    names = {ours: theirs for theirs, ours in _INITS.items()}
    return {n: names.get(said[ours], said[ours]) for n, ours in _VELORA.items()}


def replicate(model: nn.Module, what: PeftFolder, folder: str | Path) -> Callable[[], None]:
    """Let a model run its blocks as often as the folder says; what takes it back. A model that runs
    them so already stays as it is. Raises FormatError for blocks that it has not."""
    spans, there = what.config.get("layer_replication"), repeated(model)
    if not spans and there is None:
        return lambda: None
    try:
        if there is None:
            return repeat(model, spans)
        if spans and checked(spans) == there:
            return lambda: None
    except ConfigError as e:
        raise FormatError(f"{folder}: layer_replication: {e}") from None
    raise FormatError(f"{folder} is for blocks run as layer_replication = {shown(spans)}, and this "
                      f"model runs {shown([list(s) for s in there])} of its base's")


def replicated(model: nn.Module, what: PeftFolder) -> None:
    """Note how often a model's blocks are run. Raises FormatError where PEFT could not say so."""
    if (spans := repeated(model)) is not None:
        if what.kind != "LORA":
            raise FormatError("this model runs blocks again, which PEFT says beside LoRA alone "
                              f"(layer_replication), not beside {what.kind}")
        what.spans = [list(s) for s in spans]


def shift(x: Lora, path: str, shifts: Sequence[tuple[Shift, float]]) -> None:
    """Give an update the bias that stands beside it. Raises FormatError where PEFT has none."""
    if not shifts:
        return
    if x.kind != "linear" or x.magnitude is not None:
        raise FormatError(f"{path} has a shift of its outputs, which PEFT's LoRA has beside a "
                          f"linear alone, not beside a {x.kind if x.kind != 'linear' else 'DoRA'}")
    made = sum((weight * s.whole(len(x.B)).detach() for s, weight in shifts), x.B.new_zeros(()))
    x.shift = made / x.scale


def all_shift(what: PeftFolder) -> None:
    """PEFT has a bias beside every update or beside none: the others get one of zeros."""
    if all(x.shift is None for x in what.loras.values()):
        return
    for path, x in what.loras.items():
        if x.kind != "linear" or x.magnitude is not None:
            raise FormatError(f"PEFT's lora_bias stands beside all updates, and {path} is no plain "
                              "update of a linear; export one part at a time")
        if x.shift is None:
            x.shift = x.B.new_zeros(len(x.B))
    if what.experts:
        raise FormatError("PEFT has no lora_bias beside an update of experts")


def scale_of(out: PeftFolder, name: str, rank: int, folder: str | Path) -> float:
    """The factor of an update, by the settings. Raises FormatError where they have another rank."""
    config = out.config
    if (said := pattern(config.get("rank_pattern"), name, config.get("r") or rank)) != rank:
        raise FormatError(f"{folder}: {name} has rank {rank}, its settings say {said}")
    alpha = pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if out.rslora else rank))


def _ids(asked: Any, path: str) -> list[Any]:
    """PEFT's rule: a list is of the embedding; a mapping's keys are names, or their ends."""
    found = asked if isinstance(asked, list) else next(
        (v for k, v in asked.items() if path == k or path.endswith(f".{k}")), []) \
        if isinstance(asked, dict) else []
    return found if isinstance(found, list) else []


def config_of(what: PeftFolder) -> dict[str, Any]:
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
        "lora_bias": any(x.shift is not None for x in what.loras.values()),
        "use_dora": any(x.magnitude is not None for x in what.loras.values()),
        "fan_in_fan_out": what.fan_in_fan_out, "velora_config": what.velora,
    }


def tensors_of(path: str, x: Lora) -> dict[str, Tensor]:
    A, B = x.A, x.B
    if x.kind == "embedding":
        out = {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B}
    else:
        if x.kind == "conv":
            A, B = A.unflatten(1, x.kernel), B.view(*B.shape, *([1] * (len(x.kernel) - 1)))
        out = {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    if x.shift is not None:
        out[f"{path}.lora_B.bias"] = x.shift
    if x.magnitude is not None:
        m = x.magnitude
        if x.kind == "conv":
            m = m.view(1, -1, *([1] * (len(x.kernel) - 1)))
        out[f"{path}.lora_magnitude_vector"] = m
    return out
