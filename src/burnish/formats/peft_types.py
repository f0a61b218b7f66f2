"""Which of PEFT's types an adapter is exported as: one of its own where it is nothing else."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..blocks.state.gates import Shift
from ..blocks.weight.shared import Shared
from ..blocks.weight.term import Wrap
from ..core.errors import FormatError
from ..core.recipe import key_of
from ..engine.slot import Part, slots
from ..engine.tuned import Tuned
from ..methods.delta.lowrank.miss import Shards
from .peft_folder import PeftFolder
from .peft_forms import OF_TERM
from .peft_own import Form, Own
from .peft_variants import OF_VARIANT


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
    """Does it add something of its own: no store of tensors that places share, nor the other end of
    a tied table, nor what only decides what is kept for backward?"""
    return not isinstance(made, Shared) and getattr(made, "changes", True) \
        and not getattr(made, "mirrors", False)


def as_own(tuned: Tuned, what: PeftFolder, weights: dict[str, float], near: bool = False) -> None:
    """The adapter as a PEFT type of its own when it is nothing else (see peft_forms.py).

    near: an approximation as LoRA will do where PEFT has no form for one of its layers.
    """
    found: list[tuple[str, nn.Module, Part, Any]] = []
    shifts: dict[str, Tensor] = {}
    for path, module, slot in slots(tuned.model):
        mine = [p for p in slot.parts if p.adapter in weights
                and counts(slot.module_of(p))]
        terms = [slot.module_of(part) for part in mine]
        if len(mine) == 2 and isinstance(terms[1], Shift) and (f := _form(terms[0])) and f.shifts \
                and weights[mine[1].adapter] == 1:
            shifts[path] = terms[1].whole(mine[0].place.out if mine[0].place else 0).detach()
            mine, terms = mine[:1], terms[:1]
        if len(mine) > 1 and not _one_part(terms):
            return
        for part in mine:
            if weights[part.adapter] != 1 or part.place is not None and (
                    part.place.param != "weight" or part.place.rows):
                return
        if mine:
            found.append((path, module, mine[0], terms[0] if len(mine) == 1 else tuple(terms)))
    forms = {_form(term) for *_, term in found}
    if len(forms) != 1 or (form := forms.pop()) is None:
        return
    given: dict[str, dict[str, Any]] = {}
    try:
        for path, module, part, term in found:
            if form.plain:
                check_plain(module, path)
            form.check_layer(module, path)
            recipe = tuned.adapters[part.adapter].recipe
            key = getattr(_first(term), "part", part.key)
            method = next(m for m in recipe if key in (key_of(recipe, m), m.name))
            tensors, given[path] = form.give(term, method, module, path)
            what.own[path] = Own(method.name, {}, tensors, form=form)
        form.check_found({p: m for p, m, *_ in found}, [t for *_, t in found], method)
        what.settings = form.finish(_together(form, given))
        if shifts:
            what.settings |= form.give_shifts(what.own, shifts, {p: m for p, m, *_ in found})
        what.beside, said = _beside(form, [term for *_, term in found])
        what.settings |= said
    except FormatError:
        what.own, what.settings, what.beside = {}, {}, {}
        if form.pairs or near and not isinstance(found[0][3], Wrap):
            return                               # as a LoRA then
        raise
    what.kind, what.form = form.kind, form


def _one_part(terms: list[nn.Module]) -> bool:
    """Are they the answer of one part of the recipe, in a type that has several?"""
    form = _form(terms[0])
    parts = {getattr(t, "part", id(t)) for t in terms}
    return form is not None and form.several and len(parts) == 1


def _form(term: Any) -> Form | None:
    """The row of the tables that a term is of."""
    kind = type(_first(term))
    return OF_TERM.get(kind) or OF_VARIANT.get(kind)


def _first(term: Any) -> Any:
    return term[0] if isinstance(term, tuple) else term


def _together(form: Form, given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One set of settings for all modules, with PEFT's patterns where it has them."""
    common = dict(next(iter(given.values())))
    for path, said in given.items():
        for name, value in said.items():
            if value == common[name]:
                continue
            if isinstance(value, dict):          # told module by module
                common[name] = {**common[name], **value}
                continue
            if name not in form.patterned:
                raise FormatError(f"{path} has {name} = {value!r}, others {common[name]!r}: PEFT "
                                  "has one for all modules; export one part at a time")
            key = path if form.named else f"^{re.escape(path)}"
            common.setdefault(form.patterned[name], {})[key] = value
    return common


def _beside(form: Form, terms: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What all modules read, and what settings say of it."""
    if not (form.beside or form.shares):
        return {}, {}
    form.check_all(terms)
    shared = {id(t.shared): t.shared for t in terms}
    if len(shared) > 1:
        raise FormatError(f"PEFT's {form.kind} has one set of tensors that all modules read; "
                          "export one part at a time")
    return form.give_beside(next(iter(shared.values())), terms)
