"""From PEFT: a folder joined to its base, or to a base that has adapters already.

The recipe of what is read is written out per rank and scale, each part with its targets; every
tensor then has the value that the folder says.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.state.gates import Shift
from ..blocks.weight.factor import Chain
from ..blocks.weight.magnitude import Magnitude
from ..blocks.weight.shards import Shards
from ..core.anatomy import Anatomy
from ..core.asked import Asked
from ..core.errors import ConfigError, FormatError, RecipeError, nearest
from ..core.recipe import Recipe, key_of, make, parse
from ..engine.slot import ATTR, slots
from ..engine.tune import check_model, join
from ..engine.tuned import DEFAULT, Tuned
from ..engine.undo import Transaction, whole
from . import (
    peft_experts,
    peft_files,
    peft_lora,
    peft_own,
    peft_prompts,
    peft_settings,
    peft_shared,
    peft_tied,
    peft_whole,
)
from .peft_folder import Lora, PeftFolder
from .peft_types import check_plain, counts

Settings = tuple[tuple[str, Any], ...]


def load_peft(model: nn.Module | Tuned, folder: str | Path, name: str | None = None) -> Tuned:
    """Join a PEFT folder to its base, in place: LoRA, rsLoRA, DoRA, MiSS or one of peft_forms.py,
    a trained head too.

    The recipe of what comes back is written out per rank and scale, with its targets, so it can be
    trained on, saved and exported like any other. Done whole or not at all: whatever is refused
    leaves the model as it was. A folder with `layer_replication` repeats the model's blocks in
    place, as ``burnish.repeat_blocks`` does, and they stay so. Raises FormatError for what has no
    counterpart here and for a model the folder does not fit; TargetError for modules burnish cannot
    adapt.

    model: a base; or what has adapters already, ``load_peft(tuned, folder, "law")``: the folder is
    one more, which comes into use by ``tuned.use("law")``, alone or in a mix, as after
    :meth:`~burnish.Tuned.add`. name: of the adapter, for a base "default" unless it is said.
    """
    what = peft_files.read(folder)
    if isinstance(model, Tuned):
        return _beside(model, what, folder, name)
    if ATTR in getattr(model, "_modules", ()):
        raise ConfigError("this model is tuned already; tuned.detach() it first, or hand over its "
                          "handle, load_peft(tuned, folder, name)")
    check_model(model)
    back = peft_lora.replicate(model, what, folder)
    try:
        recipe, args = _recipe(model, Anatomy.of(model), what, folder)

        def change(undo: Transaction) -> Tuned:
            tuned = join(model, recipe, undo, filled=True, name=name or DEFAULT, **args)
            _fill(tuned, what, folder, name or DEFAULT)
            tuned.filled, tuned.undo = False, None
            return tuned

        return whole(model, change)
    except BaseException:
        back()
        raise


def _beside(tuned: Tuned, what: PeftFolder, folder: str | Path, name: str | None) -> Tuned:
    """One more adapter of a model that is tuned."""
    if name is None:
        raise ConfigError("this model is tuned; say what one more adapter is called: "
                          'load_peft(tuned, folder, "law")')
    tuned.check_ready()
    peft_lora.replicate(tuned.model, what, folder)
    def change() -> None:
        with tuned.disabled():                   # what is read of the base is the base's
            recipe, args = _recipe(tuned.model, replace(tuned.anatomy, asked=Asked()), what, folder)
        tuned.filled = True
        tuned.add(name, recipe, **args)
        with tuned.disabled():
            _fill(tuned, what, folder, name)

    try:
        tuned.change(change)
    finally:
        tuned.filled = False
    return tuned


def _recipe(model: nn.Module, anatomy: Anatomy, what: PeftFolder, folder: str | Path
            ) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe of what a folder says, with what else is said where it is joined)."""
    names = {n: m for n, m in model.named_modules() if f".{ATTR}." not in f".{n}."}
    peft_shared.place(what, names, folder)
    peft_tied.once(anatomy, what, folder)
    _place(anatomy, what, folder)
    for path in what.modules:
        if path not in names:
            raise FormatError(f"{folder} adapts {path}, which {type(model).__name__} does not "
                              f"have{nearest(path, names)}")
        if path not in what.norms and (path not in what.own or what.own[path].form.plain):
            check_plain(names[path], path)
        if path in what.own:
            own = what.own[path]
            own.form.check_layer(names[path], path)
            own.shift = peft_own.asked(f"{folder}: {path}", own.form.shift_of, own, names[path])
    if what.form is not None and not what.beside and (what.form.beside or what.form.shares):
        what.beside = what.form.draw(what.config, {p: names[p] for p in what.own})
    head, extra = peft_whole.trained(anatomy, what, folder)
    groups = _groups(what)
    try:
        parts = [make(method, {**dict(args), **_where(anatomy, what, paths, folder)})
                 for (method, args), paths in groups.items()]
        if what.plain_lora:
            extra += peft_lora.compressed(what.config, folder)
    except RecipeError as e:
        raise FormatError(f"{folder}: {e}") from None
    parts += peft_prompts.part(what, folder)
    recipe = parse(parts + extra)
    settled = {key_of(recipe, part): {f"{p}.weight": what.own[p].settled for p in paths
                                      if p in what.own and what.own[p].settled}
               for part, paths in zip(recipe, groups.values(), strict=False)}
    return recipe, {"head": head, "settled": {k: v for k, v in settled.items() if v}}


def _place(anatomy: Anatomy, what: PeftFolder, folder: str | Path) -> None:
    """Find out what is a layer's and what a stack of experts'."""
    for path, (A, B) in what.pairs.items():
        place, said = peft_experts.place_of(anatomy, path, what.config["target_parameters"])
        if place is None:
            what.loras[path] = Lora(A, B, peft_lora.scale_of(what, said, len(A), folder)
                                    if said else 1.0)
            continue
        stack = peft_experts.take(place, anatomy.model.get_submodule(place.path), A, B, str(folder))
        stack.scale = peft_lora.scale_of(what, said, stack.rank, folder)
        what.experts[said] = stack


def _where(anatomy: Anatomy, what: PeftFolder, paths: list[str], folder: str | Path
           ) -> dict[str, Any]:
    """What a part of the recipe is told of where it stands."""
    form = what.own[paths[0]].form if paths[0] in what.own else None
    said = None if form is None else form.aim(anatomy, paths)
    return {"targets": peft_whole.expression(anatomy, paths, folder)} if said is None else said


def _groups(what: PeftFolder) -> dict[tuple[str, Settings], list[str]]:
    """(method, settings) -> the modules that share them: one part of the recipe each."""
    out: dict[tuple[str, Settings], list[str]] = {}
    for path, D in what.blocks.items():
        args: dict[str, Any] = {"rank": D.shape[0], "dropout": what.dropout} \
            | ({"mini": D.shape[1]} if what.mini else {})
        out.setdefault(("miss", tuple(args.items())), []).append(path)
    for path, own in what.own.items():
        out.setdefault((own.method, tuple(own.settings.items())), []).append(path)
    for path, x in {**what.loras, **what.experts}.items():
        dora = getattr(x, "magnitude", None) is not None
        args = {"rank": x.rank, "dropout": what.dropout,
                "alpha": round(x.scale * (x.rank**0.5 if what.rslora else x.rank), 9)}
        if what.rslora:
            args["scaling"] = "rs"
        if dora and what.dropout:
            args["drop_base"] = True
        method = "dora" if dora else "lora"
        if what.minor and path in what.loras and x.kind != "embedding" and not what.rslora:
            method = "mica"                      # B is what the weight uses least, and stays
        out.setdefault((method, tuple(args.items())), []).append(path)
    for path, x in what.loras.items():
        if x.shift is not None:
            out.setdefault(("beft", (("scale", x.scale),)), []).append(path)
    for path, own in what.own.items():
        if own.shift is not None:
            out.setdefault(("beft", ()), []).append(path)
    return out


@torch.no_grad()
def _fill(tuned: Tuned, what: PeftFolder, folder: str | Path, adapter: str) -> None:
    def put(there: Tensor, value: Tensor, name: str) -> None:
        if there.shape != value.shape:
            raise FormatError(f"{folder}: {name} is {list(value.shape)}, the model needs "
                              f"{list(there.shape)}")
        if (key := name.rpartition("."))[0::2] in tuned.originals:
            tuned.undo.keep(there, partial(tuned.originals.get, *key[0::2]))
        there.copy_(value)

    filled = False
    tuned.adapters[adapter].notes += peft_settings.notes(what.config)
    peft_prompts.fill(tuned, what, put, folder, adapter)
    for path, module, slot in slots(tuned.model):
        for part in (p for p in slot.parts if p.adapter == adapter):
            term = slot.module_of(part)
            if path in what.own and isinstance(term, Shift) and what.own[path].shift is not None:
                put(term.shift, what.own[path].shift, f"{path}, the shift of its outputs")
            elif path in what.own and counts(term):
                shared = term.__dict__.get("shared")
                if shared is not None and not filled:
                    filled = True
                    _fill_beside(what, shared, put, folder)
                peft_own.fill(what.own[path], term, module, put, f"{folder}: {path}")
            elif isinstance(term, Shards):
                put(term.D, what.blocks[path], f"{path}.miss_block")
            elif isinstance(term, Shift):
                put(term.shift, what.loras[path].shift, f"{path}.lora_B.bias")
            elif isinstance(term, Magnitude):
                put(term.m, what.loras[path].magnitude, f"{path}.lora_magnitude_vector")
            elif isinstance(term, Chain):
                x = what.experts.get(part.place.name) or what.loras[path]
                put(term.A, x.A, f"{path}.lora_A")
                put(term.B, x.B, f"{path}.lora_B")
    away = tuned.adapters[adapter].away          # its values wait where others are in use
    # by the tables of modules: an attribute may be what stands for a parameter
    named = dict(tuned.model.named_parameters(remove_duplicate=False))
    first = {id(p): n for n, p in tuned.model.named_parameters()}
    for name, value in what.whole.items():
        if away is None:
            put(tuned.model.get_parameter(name), value, name)
        else:
            away[first[id(named[name])]].copy_(value)


def _fill_beside(what: PeftFolder, shared: nn.Module, put: Any, folder: str | Path) -> None:
    """The tensors that all modules read."""
    assert what.form is not None
    if missing := [n for n in what.form.beside if n not in what.beside]:
        raise FormatError(f"{folder} has no {missing[0]}, which its modules read; save it with "
                          "save_projection=True")
    for name, value in what.form.values_beside(what.beside, shared).items():
        put(getattr(shared, name), value, name)
