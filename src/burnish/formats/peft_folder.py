"""What a PEFT adapter folder says, as data (peft_files.py reads and writes it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, FormatError
from ..core.patterns import Pattern
from ..core.reading import shown
from .peft_experts import Stack
from .peft_own import Form, Own, plain_bias

PREFIX = "base_model.model."


@dataclass
class Lora:
    """One module: ``scale B A`` on its (out, in) matrix. A (rank, in), B (out, rank); ``scale
    shift`` on its outputs, (out,)."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    kind: str = "linear"                       # "linear", "embedding" or "conv"
    magnitude: Tensor | None = None            # DoRA: (out,)
    kernel: tuple[int, ...] = ()               # conv: what A's columns unflatten to
    shift: Tensor | None = None                # lora_bias

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
    minor: a LoRA whose B is frozen (MiCA). spans: runs of the base's blocks that it is for. A LORA
    with a `form` is one of peft_variants.py.
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
    velora: dict[str, Any] | None = None
    spans: list[list[int]] | None = None

    @property
    def modules(self) -> list[str]:
        return [*self.loras, *self.blocks, *self.own, *self.norms]

    @property
    def adapted(self) -> list[str]:
        """The modules that the type itself is about, without tokens beside a LoRA."""
        return [p for p in self.modules if not self.plain_lora or p not in self.own]

    @property
    def plain_lora(self) -> bool:
        """Is it LoRA, and none of its variants?"""
        return self.kind == "LORA" and self.form is None


def keep(out: PeftFolder, name: str, value: Tensor) -> None:
    """What is no adapter's: it trained outright."""
    if own := name if out.bias == "none" else plain_bias(name):
        out.whole[own] = value


def strip(key: str, folder: Path) -> str:
    if not key.startswith(PREFIX):
        raise FormatError(f"{folder}: tensor {key!r} is not named as PEFT names them "
                          f"({PREFIX}...)")
    return key.removeprefix(PREFIX)


def pattern(patterns: Mapping[str, float] | None, path: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a pattern, matches the end of the module's name."""
    for key, value in (patterns or {}).items():
        try:
            found = Pattern(rf"(?:.*\.)?(?:{key})$").match(path)
        except ConfigError as e:
            raise FormatError(f"pattern {shown(key, 60)} of alpha or rank: {e}") from None
        if found:
            return value
    return default
