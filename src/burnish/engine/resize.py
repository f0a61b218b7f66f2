"""Terms whose rank changes while they train: tensors, gradients, moments and files go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..blocks.update.resize import Moments, check, resize
from ..core.errors import ConfigError
from .slot import Part, slots
from .swap import ATTR

if TYPE_CHECKING:
    from .tuned import Tuned


def resize_term(tuned: Tuned, term: Any, keep: Tensor | Mapping[str, Tensor] | None,
                fresh: Mapping[str, Tensor] | None, moments: Moments = "keep") -> None:
    """See :meth:`burnish.Tuned.resize`."""
    adapter, part, prefix = _where(tuned, term)
    optimizer = tuned.current_optimizer
    for name in term.ranked:
        check(getattr(term, name), optimizer, f"{prefix}.{name}")
    for name, dim in term.ranked.items():
        stay = keep.get(name) if isinstance(keep, Mapping) else keep
        new = None if fresh is None else fresh.get(name)
        resize(getattr(term, name), dim, stay, new, optimizer, f"{prefix}.{name}", moments)
    _record(tuned, adapter, part, term)


@torch.no_grad()
def follow(tuned: Tuned, tensors: Mapping[str, Tensor]) -> None:
    """Give every term whose rank may change the rank it has in `tensors`, by name."""
    for path, _, slot in slots(tuned.model):
        for part in slot.parts:
            term = slot.module_of(part)
            ranked = getattr(term, "ranked", {})
            changed = False
            for name, dim in ranked.items():
                p = getattr(term, name)
                there = tensors.get(_prefix(path, part) + f".{name}")
                if there is None or there.dim() != p.dim() or there.shape == p.shape \
                        or any(a != b for i, (a, b) in enumerate(zip(there.shape, p.shape,
                                                                     strict=True)) if i != dim):
                    continue
                n, old = there.shape[dim], p.shape[dim]
                more = list(p.shape)
                more[dim] = max(0, n - old)
                resize(p, dim, torch.arange(min(n, old)), p.new_zeros(more),
                       tuned.current_optimizer)
                changed = True
            if changed:
                _record(tuned, part.adapter, part, term)


def _prefix(path: str, part: Part) -> str:
    return ".".join(filter(None, (path, ATTR, part.adapter, part.key)))


def _where(tuned: Tuned, term: Any) -> tuple[str, Part, str]:
    if not getattr(term, "ranked", None):
        raise ConfigError(f"{type(term).__name__} says of no tensor along which axis its rank "
                          "lies (Term.ranked), so it cannot be resized")
    for path, _, slot in slots(tuned.model):
        for part in slot.parts:
            if slot.module_of(part) is term:
                return part.adapter, part, _prefix(path, part)
    raise ConfigError("this term is no part of the tuned model")


def _record(tuned: Tuned, adapter: str, part: Part, term: Any) -> None:
    places = tuned.adapters[adapter].settled.setdefault(term.part, {})
    places.setdefault(part.place.name, {}).update(term.settled())
