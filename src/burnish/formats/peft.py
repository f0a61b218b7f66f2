"""To PEFT and back: LoRA, rsLoRA, DoRA, MiSS, LoKr, OFT and VeRA as `peft` stores them.

Every update that is a product of factors has an exact LoRA form: slices of a fused projection
become one pair with zero rows, several terms on one matrix are stacked, PiSSA becomes twice its
rank. MiSS, LoKr, OFT and VeRA keep their own type where the whole adapter is one of them. What has
none is refused, or approximated at a rank the caller names.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.weight.factor import Chain
from ..blocks.weight.factor_algebra import Factors, cat, truncate
from ..blocks.weight.magnitude import Magnitude
from ..blocks.weight.provided import Term, Wrap
from ..blocks.weight.shards import Shards
from ..core.anatomy import Anatomy
from ..core.errors import ConfigError, FormatError, TargetError, nearest
from ..core.recipe import make, parse
from ..core.site import Place
from ..core.targets import match
from ..engine.adapters import moved_buffers
from ..engine.slot import ATTR, Slot, slots
from ..engine.tune import check_model, join
from ..engine.tuned import Tuned
from ..engine.undo import Transaction, whole
from . import peft_files
from .card import code
from .fingerprint import check_tied
from .peft_files import Lora, PeftFolder
from .peft_types import as_miss, as_own, check_plain, counts

_KINDS = {"linear": "linear", "conv1d": "linear", "embedding": "embedding", "conv": "conv"}
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
          "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


# -- out ------------------------------------------------------------------------------------
@torch.no_grad()
def export_peft(tuned: Tuned, folder: str | Path, name: str | None = None,
                rank: int | None = None) -> Path:
    """Write an adapter as a PEFT folder; ``peft.PeftModel.from_pretrained(base, folder)`` then
    computes what `tuned` computes.

    name: which adapter; default what is active, a weighted mix included.
    rank: approximate updates that have no factors by their best rank-`rank` form (a truncated
    SVD; the error is written in README.md). Without it they are refused.

    Raises FormatError naming what PEFT has no form for.
    """
    tuned.check_ready()
    if name is not None:
        tuned.adapters.known(name)
    weights = {name: 1.0} if name else dict(tuned.state.active)
    if not weights:
        raise FormatError("per-sample adapters are several; name the one to export")
    what = PeftFolder(base=_base_name(tuned.model))
    errors: dict[str, float] = {}
    as_own(tuned, what, weights, near=rank is not None)
    for path, module, slot in slots(tuned.model) if not what.own else ():
        parts = _parts(slot, path, weights)
        if parts:
            what.loras[path] = _lora(module, slot, path, parts, rank, errors)
    if not what.modules:
        raise FormatError("the adapter adds to no weight: there is nothing PEFT could hold")
    as_miss(tuned, what, weights)
    _fill_dora(tuned, what)
    _whole(tuned, what, weights)
    settings = [m.settings() for n in weights for m in tuned.adapters[n].recipe]
    what.dropout = next((float(s["dropout"]) for s in settings if s.get("dropout")), 0.0)
    what.rslora = any(s.get("scaling") == "rs" for s in settings)
    what.fan_in_fan_out = all(type(tuned.model.get_submodule(p)).__name__ == "Conv1D"
                              for p in what.modules)
    if what.own and what.kind != "LOKR":
        what.settings["fan_in_fan_out"] = what.fan_in_fan_out
    what.task_type = _task(tuned.model, what)
    names = [n for n, _ in tuned.model.named_modules() if ".burnish" not in f".{n}"]
    return peft_files.write(folder, what, names, _card(what, tuned, errors))


def lora_form(term: Term, rank: int | None = None) -> tuple[Factors, float] | None:
    """(factors of a term, relative error): exact where it has factors, else at `rank`, or None."""
    if isinstance(term, Chain):
        pair = Factors(term.A.detach(), term.B.detach(), term.scale)
        start = getattr(term, "A0", None)
        if start is not None:
            pair = cat([pair, Factors(start, term.B0, term.scale)], [1.0, -1.0])
        elif hasattr(term, "A0"):
            return None                          # its start lives in a stored residual
        return pair, 0.0
    if isinstance(term, Shards):
        repeat = -(-term.inp // term.rank)
        A = torch.eye(term.rank, dtype=term.D.dtype, device=term.D.device).repeat(1, repeat)
        B = term.D.detach().repeat(1, term.repeat).t()
        return Factors(A[:, : term.inp].contiguous(), B.contiguous()), 0.0
    if rank is None:
        return None
    dense = term.dense().detach().float()
    if dense.dim() != 2:
        return None
    r = min(rank, *dense.shape)
    whole = Factors(torch.eye(dense.shape[1], device=dense.device), dense)
    got = truncate(whole, r)
    return got, float((got.dense() - dense).norm() / dense.norm().clamp_min(1e-30))


_Parts = list[tuple[Place, Term, float]]
Settings = tuple[tuple[str, Any], ...]


def _parts(slot: Slot, path: str, weights: dict[str, float]) -> _Parts:
    out: _Parts = []
    for part in slot.parts:
        if part.adapter not in weights or not counts(slot.module_of(part)):
            continue
        if part.place is None:
            raise FormatError(f"{part.key} at {path or 'the root'} computes on hidden states; PEFT "
                              "folders hold updates of weights. Drop it from the recipe to export")
        if part.place.kind not in _KINDS or part.place.param != "weight":
            raise FormatError(f"{part.key} updates {part.place.name} (kind {part.place.kind}); "
                              "PEFT adapts the weight of a module of its own")
        out.append((part.place, slot.module_of(part), weights[part.adapter]))
    return out


def _lora(module: nn.Module, slot: Slot, path: str, parts: _Parts, rank: int | None,
          errors: dict[str, float]) -> Lora:
    pairs: list[Factors] = []
    magnitude: Tensor | None = None
    rows: list[tuple[Place, Magnitude]] = []
    out = replace(parts[0][0], rows=None).view(slot._stored(module, "weight")).shape[0]
    for place, term, weight in parts:
        if isinstance(term, Magnitude):
            rows.append((place, term))
            continue
        made = None if isinstance(term, Wrap) else lora_form(term, rank)
        if made is None:
            kind = type(term).__name__.lower()
            raise FormatError(
                f"{place.name}: {kind} has no exact LoRA form" + (
                    "" if isinstance(term, Wrap) or hasattr(term, "A0")
                    else "; export_peft(..., rank=16) writes the best approximation of that rank"))
        pair, error = made
        if error:
            errors[place.name] = error
        if place.rows:
            B = pair.B.new_zeros(out, pair.rank)
            B[place.rows[0] : place.rows[1]] = pair.B
            pair = replace(pair, B=B)
        pairs.append(pair if weight == 1 else weight * pair)
    if not pairs:
        raise FormatError(f"{path}: a magnitude alone has no PEFT form")
    check_plain(module, path)
    pair = pairs[0] if len(pairs) == 1 else cat(pairs)
    kind = _KINDS[parts[0][0].kind]
    if kind == "conv" and getattr(module, "groups", 1) != 1:
        raise FormatError(f"{path}: PEFT's LoRA of a grouped convolution is another function")
    lora = Lora(pair.A, pair.B, pair.scale, kind,
                kernel=tuple(module.weight.shape[1:]) if kind == "conv" else ())
    if rows:
        magnitude = _row_norms(slot, module, parts[0][0], lora)
        for place, term in rows:
            a, b = place.rows or (0, out)
            magnitude[a:b] = term.m
        lora.magnitude = magnitude
    return lora


def _row_norms(slot: Slot, module: nn.Module, place: Place, x: Lora) -> Tensor:
    """The magnitude that changes nothing: the row lengths of the updated weight."""
    W = replace(place, rows=None).view(slot._stored(module, "weight")).float()
    return torch.linalg.vector_norm(W + x.scale * (x.B @ x.A).float(), dim=1)


def _fill_dora(tuned: Tuned, what: PeftFolder) -> None:
    """PEFT has DoRA everywhere or nowhere: the others get the magnitude that changes nothing."""
    if not any(x.magnitude is not None for x in what.loras.values()):
        return
    for path, module, slot in slots(tuned.model):
        x = what.loras.get(path)
        if x is not None and x.magnitude is None:
            place = next(p.place for p in slot.parts if p.place is not None)
            x.magnitude = _row_norms(slot, module, place, x)


def _whole(tuned: Tuned, what: PeftFolder, weights: dict[str, float]) -> None:
    """Parameters that train outright become modules saved whole, as high up as they reach."""
    selected = {n for a in weights for n in tuned.adapters[a].selected}
    if selected and len(weights) > 1:
        raise FormatError("a mix of adapters that train base weights cannot be exported; "
                          "name one adapter")
    names = {n for n, _ in tuned.model.named_parameters() if ".burnish." not in f".{n}"}
    owners: set[str] = set()
    for n in selected:
        owner = n.rpartition(".")[0]
        parent = owner.rpartition(".")[0]
        while parent and {m for m in names if m.startswith(parent + ".")} <= selected:
            owner, parent = parent, parent.rpartition(".")[0]
        owners.add(owner)
    for owner in sorted(owners):
        inside = [m for m in what.modules if m == owner or m.startswith(owner + ".")]
        if inside or not owner:
            raise FormatError(f"{owner or 'the root'} trains whole and holds an update too "
                              f"({(inside or ['root'])[0]}); PEFT has one or the other")
        what.saved.append(owner)
        state = tuned.model.get_submodule(owner).state_dict()
        what.whole |= {f"{owner}.{k}": v for k, v in state.items()}
    for a in weights:                            # its own values also where another's stand
        own = {**tuned.adapters[a].values(), **moved_buffers(tuned, a)}
        what.whole |= {k: v for k, v in own.items() if k in what.whole}
        if loose := [k for k in own if k not in what.whole]:
            raise FormatError(f"training {a!r} has moved {loose[0]}, and PEFT has no form for "
                              "running statistics outside modules saved whole; train with those "
                              "modules in evaluation mode, or save with tuned.save(folder)")


def _task(model: nn.Module, what: PeftFolder) -> str | None:
    """For classification PEFT expects the head in the folder: named only where it is there."""
    kind = next((t for end, t in _TASKS.items() if type(model).__name__.endswith(end)), None)
    heads = {n for n, _ in model.named_modules() if n.endswith(("classifier", "score"))}
    return kind if kind == "CAUSAL_LM" or heads <= set(what.saved) else None


def _base_name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or ""


def _card(what: PeftFolder, tuned: Tuned, errors: dict[str, float]) -> str:
    head = ["---", "library_name: peft"]
    if what.base:
        head += [f"base_model: {json.dumps(what.base)}"]
    head += ["tags:", "- burnish", "---", "",
             f"Trained with burnish, recipe {code(tuned.recipe)}; a PEFT adapter of type "
             f"{what.kind}."]
    if errors:
        worst = max(errors, key=lambda n: errors[n])
        head += ["", f"{len(errors)} updates are approximated; the largest relative error is "
                     f"{errors[worst]:.3g} at {code(worst)}."]
    return "\n".join(head) + "\n"


# -- in -------------------------------------------------------------------------------------
def load_peft(model: nn.Module, folder: str | Path) -> Tuned:
    """Join a PEFT folder to its base, in place: LoRA, rsLoRA, DoRA, MiSS, LoKr or OFT, a trained
    head too.

    The recipe of what comes back is written out per rank and scale, with its targets, so it can be
    trained on, saved and exported like any other. Done whole or not at all: whatever is refused
    leaves the model as it was. Raises FormatError for what has no counterpart
    here and for a model the folder does not fit; TargetError for modules burnish cannot adapt.
    """
    what = peft_files.read(folder)
    if ATTR in getattr(model, "_modules", ()):
        raise ConfigError("this model is tuned already; tuned.detach() it first")
    names = {n: m for n, m in model.named_modules()}
    for path in what.modules:
        if path not in names:
            raise FormatError(f"{folder} adapts {path}, which {type(model).__name__} does not "
                              f"have{nearest(path, names)}")
        check_plain(names[path], path)
    anatomy = Anatomy.of(model)
    head, extra = _trained_outright(anatomy, what, folder)
    parts = [make(name, {**dict(args), "targets": _expression(anatomy, paths, folder)})
             for (name, args), paths in _groups(what).items()]
    if extra:
        parts.append(make("full", {"targets": _expression(anatomy, extra, folder)}))

    def change(undo: Transaction) -> Tuned:
        tuned = join(model, parse(parts), undo, head=head, filled=True)
        _fill(tuned, what, folder)
        tuned.filled, tuned.undo = False, None
        return tuned

    check_model(model)
    return whole(model, change)


def _groups(what: PeftFolder) -> dict[tuple[str, Settings], list[str]]:
    """(method, settings) -> the modules that share them: one part of the recipe each."""
    out: dict[tuple[str, Settings], list[str]] = {}
    for path, D in what.blocks.items():
        args: dict[str, Any] = {"rank": D.shape[0]} | ({"mini": D.shape[1]} if what.mini else {})
        out.setdefault(("miss", tuple(args.items())), []).append(path)
    for path, own in what.own.items():
        out.setdefault((own.method, tuple(own.settings.items())), []).append(path)
    for path, x in what.loras.items():
        dora = x.magnitude is not None
        args = {"rank": x.rank, "dropout": what.dropout,
                "alpha": round(x.scale * (x.rank**0.5 if what.rslora else x.rank), 9)}
        if what.rslora:
            args["scaling"] = "rs"
        out.setdefault(("dora" if dora else "lora", tuple(args.items())), []).append(path)
    return out


def _expression(anatomy: Anatomy, paths: list[str], folder: str | Path) -> str:
    """Targets that name exactly the weights of these modules."""
    wanted = {(p, "weight") for p in paths}
    last = ",".join(dict.fromkeys(p.rpartition(".")[2] for p in paths))
    for text in (last, ",".join(paths), "re:(" + "|".join(map(re.escape, paths)) + ")"):
        try:
            found = match(anatomy, text)
        except TargetError:
            continue
        if {(p.path, p.param) for p in found} == wanted and not any(p.rows for p in found):
            return text
    known = {p.path for p in anatomy.places if p.param == "weight"}
    odd = next((p for p in paths if p not in known), paths[0])
    raise FormatError(f"{folder} adapts {odd}, whose weight burnish cannot adapt by itself "
                      f"({type(anatomy.model.get_submodule(odd)).__name__})")


def _trained_outright(anatomy: Anatomy, what: PeftFolder, folder: str | Path
                      ) -> tuple[bool, list[str]]:
    """(does the head train, modules besides it that train whole)."""
    parameters = dict(anatomy.model.named_parameters(remove_duplicate=False))
    for name, value in list(what.whole.items()):
        inner = name.replace(".base_layer.", ".")
        if inner != name and inner in parameters and parameters[inner].shape == value.shape \
                and torch.equal(parameters[inner].detach().to(value), value):
            del what.whole[name]                 # an adapted embedding, saved as it was
            continue
        if name not in parameters:
            raise FormatError(f"{folder} holds {name}, which {type(anatomy.model).__name__} "
                              f"does not train{nearest(name, parameters)}")
        if parameters[name].shape != value.shape:
            raise FormatError(f"{folder}: {name} is {list(value.shape)}, the model has "
                              f"{list(parameters[name].shape)}")
    check_tied(parameters, what.whole, folder)
    first = {id(p): n for n, p in anatomy.model.named_parameters()}
    for name in list(what.whole):                # another name of a tensor that is there
        if (own := first[id(parameters[name])]) != name and own in what.whole:
            del what.whole[name]
    head = {n for n in parameters for h in anatomy.head if n.startswith(f"{h}.")}
    rest = [n for n in what.whole if n not in head]
    if head & set(what.whole) and not head <= set(what.whole):
        rest, head = list(what.whole), set()
    single = [n.removesuffix(".weight") for n in rest if n.endswith(".weight")]
    if len(single) != len(rest):
        odd = next(n for n in rest if not n.endswith(".weight"))
        raise FormatError(f"{folder} trained {odd} whole; besides a head, only modules that are "
                          "one weight can be read")
    return bool(head & set(what.whole)), single


@torch.no_grad()
def _fill(tuned: Tuned, what: PeftFolder, folder: str | Path) -> None:
    def put(there: Tensor, value: Tensor, name: str) -> None:
        if there.shape != value.shape:
            raise FormatError(f"{folder}: {name} is {list(value.shape)}, the model needs "
                              f"{list(there.shape)}")
        if (key := name.rpartition("."))[0::2] in tuned.originals:
            tuned.undo.keep(there, partial(tuned.originals.get, *key[0::2]))
        there.copy_(value)

    for path, _, slot in slots(tuned.model):
        for part in slot.parts:
            term = slot.module_of(part)
            if path in what.own:
                for name, p in term.named_parameters():
                    if name not in (values := what.own[path].values):
                        raise FormatError(f"{folder}: {path} has no {name}, the model needs "
                                          f"{list(p.shape)}")
                    put(p, values[name], f"{path}.{name}")
            elif isinstance(term, Shards):
                put(term.D, what.blocks[path], f"{path}.miss_block")
            elif isinstance(term, Magnitude):
                put(term.m, what.loras[path].magnitude, f"{path}.lora_magnitude_vector")
            elif isinstance(term, Chain):
                put(term.A, what.loras[path].A, f"{path}.lora_A")
                put(term.B, what.loras[path].B, f"{path}.lora_B")
    for name, value in what.whole.items():
        put(tuned.model.get_parameter(name), value, name)
