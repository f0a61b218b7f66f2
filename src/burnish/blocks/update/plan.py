"""The plan of an optimizer: one sentence, put together word by word (see step.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, RecipeError
from .codecs import Codec, Plain
from .rules import Rule

if TYPE_CHECKING:
    from .groups import Rates
    from .step import Subspace
    from .transform import Transform

RoundingKind = Literal["nearest", "stochastic", "master", "kahan"]
ROUNDINGS = ("nearest", "stochastic", "master", "kahan")

#: states of a weight's own shape (flat or not); a projected or coded state has others beside it
_WHOLE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "master", "compensation")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One sentence. `names` says which part of the recipe gave each word, for error messages."""

    rule: Rule
    codec: Codec = field(default_factory=Plain)
    subspace: Subspace | None = None
    transforms: tuple[Transform, ...] = ()
    rounding: RoundingKind = "nearest"
    rates: Rates | None = None              # factors of learning rates and decays
    in_backward: bool = False
    clip_value: float = 0.0                 # of a gradient's entries, inside backward
    names: dict[str, str] = field(default_factory=dict)

    def say(self, word: str, by: str, **change: Any) -> Plan:
        """The plan with one more word; saying a word twice is an error that names both parts."""
        if word in self.names:
            raise RecipeError(f"{self.names[word]} and {by} cannot be joined: both decide the "
                              f"{word} of the optimizer, which only one part may")
        return dataclasses.replace(self, names={**self.names, word: by}, **change)


def check_shape(name: str, p: nn.Parameter, state: Any, shapes: dict[nn.Parameter, torch.Size],
                whole: bool = True) -> None:
    """Raises ConfigError where a tensor has another shape than its optimizer state. whole: the
    state is of the tensor's own shape, not of a projection's."""
    if not state:
        return
    was = shapes.get(p)
    if was is None and whole:
        other = next((s for k in _WHOLE if isinstance(s := state.get(k), Tensor)
                      and s.numel() != p.numel()), None)
        was = None if other is None else other.shape
    if was is not None and was != p.shape:
        raise ConfigError(
            f"{name or 'a tensor'} has shape {tuple(p.shape)}, but its optimizer state was made "
            f"for {tuple(was)}: it was resized after a step. Nothing was stepped; make a new "
            "optimizer with tuned.optimizer(...), or resize before the first step")
