"""LoRA on parameters that no linear owns (`target_parameters`): experts in three dimensions.

    base_model.model.<module>[.base_layer ...].lora_A.weight   (experts rank, in)
                                              .lora_B.weight   (out, rank experts)

A module's parameters are wrapped one around the other, the first of them innermost: of n, the k-th
stands behind n - 1 - k times ``.base_layer``. Rows of A lie expert by expert, columns of B rank by
rank. PEFT takes a parameter as (experts, out, in) unless its module says `is_transposed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..blocks.weight.provided import Term
from ..core.anatomy import Anatomy
from ..core.errors import FormatError
from ..core.site import Place

_WRAPPED = ".base_layer"


@dataclass
class Stack:
    """An update of every matrix of a parameter: ``scale B_e A_e``, A (experts, rank, in) and B
    (experts, out, rank) as the place has them. key: where PEFT has it; turned: it sees the
    transpose."""

    A: Tensor
    B: Tensor
    scale: float
    place: Place
    key: str = ""
    turned: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def tensors(self) -> dict[str, Tensor]:
        """As a folder has them."""
        A, B = (self.B.mT, self.A.mT) if self.turned else (self.A, self.B)
        return {f"{self.key}.lora_A.weight": A.flatten(0, 1).contiguous(),
                f"{self.key}.lora_B.weight": B.permute(1, 2, 0).flatten(1).contiguous()}


def _turned(module: nn.Module, place: Place) -> bool:
    return bool(getattr(module, "is_transposed", False)) != place.transposed


# -- in -------------------------------------------------------------------------------------------
def place_of(anatomy: Anatomy, path: str, asked: list[str]) -> tuple[Place | None, str]:
    """(the stack of experts whose update stands at `path`, None where it is a layer's; the name
    that patterns of rank and alpha are held against)."""
    module = path
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    try:
        owner = anatomy.model.get_submodule(module)
    except AttributeError:
        return None, ""                          # no such module: whoever looks for it says so
    mine = [f"{module}.{n}" for n, _ in owner.named_parameters(recurse=False)
            if any(f".{module}.{n}".endswith(f".{t}") for t in asked)]
    k = len(mine) - 1 - path.count(_WRAPPED)
    if k < 0 or not mine:
        return None, path
    return next((p for p in anatomy.places if p.name == mine[k] and p.kind == "experts"),
                None), mine[k]


def take(place: Place, module: nn.Module, A: Tensor, B: Tensor, where: str) -> Stack:
    """The update of a stack from PEFT's two matrices. Raises FormatError."""
    E = place.experts
    if A.shape[0] % E:
        raise FormatError(f"{where}: {place.name} has {E} experts, and factors {list(A.shape)} "
                          f"and {list(B.shape)}")
    A, B = A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)
    return Stack(B.mT, A.mT, 1.0, place) if _turned(module, place) else Stack(A, B, 1.0, place)


# -- out ------------------------------------------------------------------------------------------
def stack_of(term: Any, place: Place, weight: float) -> Stack:
    """The update of a term on experts. Raises FormatError where it is no pair of factors each."""
    pair = term.pair() if isinstance(term, Term) else None
    if pair is None:
        raise FormatError(f"{place.name}: {type(term).__name__.lower()} has no exact LoRA form on "
                          "experts")
    A, B = (t.detach() for t in pair)
    scale = getattr(term, "scale", 1.0) or 1.0
    return Stack(A, B / scale, scale * weight, place)


def name(stacks: Mapping[str, Stack], modules: Mapping[str, nn.Module]) -> None:
    """Say where PEFT has each of all the stacks of a model."""
    for path in {s.place.path for s in stacks.values()}:
        mine = [stacks[f"{path}.{n}"] for n, _ in modules[path].named_parameters(recurse=False)
                if f"{path}.{n}" in stacks]
        for k, s in enumerate(mine):
            s.key = path + _WRAPPED * (len(mine) - 1 - k)
            s.turned = _turned(modules[path], s.place)
