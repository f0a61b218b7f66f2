"""Which of PEFT's types an adapter is exported as: one of its own where it is nothing else."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..blocks.weight.shared import Shared
from ..blocks.weight.term import Term, Wrap
from ..core.errors import FormatError
from ..core.recipe import key_of
from ..engine.slot import Part, slots
from ..engine.tuned import Tuned
from ..methods.delta.lowrank.miss import Shards
from . import peft_own
from .peft_files import PeftFolder
from .peft_own import Own


def check_plain(module: nn.Module, path: str) -> None:
    """Raises FormatError for a class whose forward is its own: burnish changes the weight that it
    computes with, PEFT adds to what comes out of it, and these are two functions. (A subclass that
    inherits its forward is plain; PEFT knows embeddings with an ``embed_scale``.)"""
    cls = getattr(type(module), "_burnish_base", type(module))
    if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers."):
        return
    plain = next((k for k in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
                  if issubclass(cls, k)), None)
    if plain is None or (cls.forward is not plain.forward
                         and not (plain is nn.Embedding and hasattr(module, "embed_scale"))):
        raise FormatError(f"{path} is a {cls.__name__}, whose forward is its own: PEFT would add "
                          "the update to its output, burnish changes the weight inside; leave it "
                          "out with targets, or merge instead")


def as_miss(tuned: Tuned, what: PeftFolder, weights: dict[str, float]) -> None:
    """The adapter as PEFT's own MISS when it is nothing else, on plain linears, in one shape."""
    found: dict[str, Shards] = {}
    for path, module, slot in slots(tuned.model):
        mine = [p for p in slot.parts if p.adapter in weights]
        for part in mine:
            term = slot.module_of(part)
            if len(mine) > 1 or not isinstance(term, Shards) or part.place.rows \
                    or not isinstance(module, nn.Linear) or weights[part.adapter] != 1:
                return
            found[path] = term
    if not found:
        return
    mini = any(t.repeat > 1 for t in found.values())
    shapes = {t.D.shape if mini else t.D.shape[:1] for t in found.values()}
    if len(shapes) == 1:
        what.kind, what.mini, what.loras = "MISS", mini, {}
        what.blocks = {p: t.D.detach() for p, t in found.items()}


def counts(made: nn.Module) -> bool:
    """Does it add something of its own: no store of tensors that places share, nor what only
    decides what is kept for backward?"""
    return not isinstance(made, Shared) and getattr(made, "changes", True)


def as_own(tuned: Tuned, what: PeftFolder, weights: dict[str, float], near: bool = False) -> None:
    """The adapter as a PEFT type of its own when it is nothing else: LoKr, OFT or VeRA.

    near: an approximation as LoRA will do where PEFT has no form for one of its layers.
    """
    found: list[tuple[str, nn.Module, Part, Term]] = []
    for path, module, slot in slots(tuned.model):
        mine = [p for p in slot.parts if p.adapter in weights
                and counts(slot.module_of(p))]
        for part in mine:
            term = slot.module_of(part)
            if len(mine) > 1 or part.place is None or part.place.param != "weight" \
                    or part.place.rows or weights[part.adapter] != 1:
                return
            found.append((path, module, part, term))
    kinds = {peft_own.TYPES.get(type(term)) for *_, term in found}
    if len(kinds) != 1 or (kind := kinds.pop()) is None:
        return
    given: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    for path, module, part, term in found:
        check_plain(module, path)
        recipe = tuned.adapters[part.adapter].recipe
        method = next(m for m in recipe if key_of(recipe, m) == term.part)
        try:
            given[path] = peft_own.give(term, method, module, path)
        except FormatError:
            if near and not isinstance(term, Wrap):
                what.own.clear()
                what.beside.clear()
                return
            raise
        what.own[path] = Own(method.name, {}, given[path][0])
        for name, b in getattr(term, "shared", nn.Module()).named_buffers():
            if what.beside.setdefault(f"vera_{name}", b) is not b:
                raise FormatError(f"{path}: PEFT's VeRA has one pair of bases for all modules; "
                                  "export one part at a time")
    what.kind, patterned = kind, {"r": "rank_pattern", "alpha": "alpha_pattern"}
    what.settings = dict(next(iter(given.values()))[1])
    for path, (_, said) in given.items():
        for name, value in said.items():
            if value == what.settings[name]:
                continue
            if kind != "LOKR" or name not in patterned:
                raise FormatError(f"{path} has {name} = {value!r}, others "
                                  f"{what.settings[name]!r}: PEFT has one for all modules; export "
                                  "one part at a time")
            what.settings.setdefault(patterned[name], {})[f"^{re.escape(path)}"] = value
