"""What PEFT folders hold whole: trained heads, norms, and modules that are one weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from ..core.anatomy import Anatomy
from ..core.errors import FormatError, TargetError, nearest
from ..core.method import Method
from ..core.recipe import make
from ..core.targets import match, tensors
from ..engine.adapters import moved_buffers
from ..engine.tuned import Tuned
from .fingerprint import check_tied
from .peft_folder import PeftFolder
from .peft_settings import BIASED


# -- out ------------------------------------------------------------------------------------
def gather(tuned: Tuned, what: PeftFolder, weights: dict[str, float]) -> None:
    """Parameters that train outright become modules saved whole, as high up as they reach."""
    selected = {n for a in weights for n in tuned.adapters[a].selected}
    if selected and len(weights) > 1:
        raise FormatError("a mix of adapters that train base weights cannot be exported; "
                          "name one adapter")
    names = {n for n, _ in tuned.model.named_parameters() if ".burnish." not in f".{n}"}
    owners: set[str] = set()
    biases = _alone(selected) if what.kind in BIASED and what.modules else set()
    for n in selected - biases:
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
    if biases:
        what.whole |= {n: tuned.model.get_parameter(n) for n in biases}
        what.bias = _which(Anatomy.of(tuned.model), biases, what)
    for a in weights:                            # its own values also where another's stand
        own = {**tuned.adapters[a].values(), **moved_buffers(tuned, a)}
        what.whole |= {k: v for k, v in own.items() if k in what.whole}
        if loose := [k for k in own if k not in what.whole]:
            raise FormatError(f"training {a!r} has moved {loose[0]}, and PEFT has no form for "
                              "running statistics outside modules saved whole; train with those "
                              "modules in evaluation mode, or save with tuned.save(folder)")
    anatomy = Anatomy.of(tuned.model)
    norms, known = set(anatomy.norms), {*anatomy.norms, *anatomy.head}
    if not what.modules and what.prompt is None and norms.intersection(what.saved) \
            and known.issuperset(what.saved):
        what.norms = [o for o in what.saved if o in norms]
        what.kind, what.saved = "LN_TUNING", [o for o in what.saved if o not in norms]


def _alone(names: Iterable[str]) -> set[str]:
    """The biases among them whose weight is not."""
    return {n for n in names if n.rpartition(".")[2] == "bias"
            and f"{n.rpartition('.')[0]}.weight" not in names}


def _biases(anatomy: Anatomy) -> set[str]:
    """Every bias outside the head, by PEFT's idea of a bias."""
    heads = tuple(f"{h}." for h in anatomy.head)
    return {n for n, _ in anatomy.model.named_parameters()
            if n.endswith(".bias") and not n.startswith(heads) and ".burnish." not in n}


def _which(anatomy: Anatomy, names: set[str], what: PeftFolder) -> str:
    """What PEFT calls these biases."""
    every = _biases(anatomy)
    own = {n for n in every if n.rpartition(".")[0] in what.adapted}
    for said, those in (("all", every), (BIASED[what.kind], own)):
        if names == those:
            return said
    raise FormatError("PEFT trains all biases beside an adapter, or those of the layers it adapts, "
                      f"not {sorted(names)[0]} and {len(names) - 1} others")


# -- in -------------------------------------------------------------------------------------
def expression(anatomy: Anatomy, paths: list[str], folder: str | Path) -> str:
    """Targets that name exactly the weights of these modules."""
    there = {p.name: (p.path, p.param) for p in anatomy.places if p.param != "weight"}
    wanted = {there.get(p, (p, "weight")) for p in paths}
    last = ",".join(dict.fromkeys(p.rpartition(".")[2] for p in paths))
    for text in (last, ",".join(paths), "re:(" + "|".join(map(re.escape, paths)) + ")"):
        try:
            found = match(anatomy, text)
        except TargetError:
            continue
        if {(p.path, p.param) for p in found} == wanted and not any(p.rows for p in found):
            return text
    known = {p.path for p in anatomy.places if p.param == "weight"} | set(there)
    odd = next((p for p in paths if p not in known), paths[0])
    raise FormatError(f"{folder} adapts {odd}, whose weight burnish cannot adapt by itself "
                      f"({type(anatomy.model.get_submodule(odd)).__name__})")


def trained(anatomy: Anatomy, what: PeftFolder, folder: str | Path) -> tuple[bool, list[Method]]:
    """(does the head train, the parts that train whole what else a folder holds)."""
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
        if parameters[name].shape != value.shape or not value.is_floating_point():
            raise FormatError(f"{folder}: {name} is {value.dtype} {list(value.shape)}, the model "
                              f"has {parameters[name].dtype} {list(parameters[name].shape)}")
    check_tied(parameters, what.whole, folder)
    first = {id(p): n for n, p in anatomy.model.named_parameters()}
    for name in list(what.whole):                # another name of a tensor that is there
        if (own := first[id(parameters[name])]) != name and own in what.whole:
            del what.whole[name]
    head = {n for n in parameters for h in anatomy.head if n.startswith(f"{h}.")}
    rest = [n for n in what.whole if n not in head]
    if head & set(what.whole) and not head <= set(what.whole):
        rest, head = list(what.whole), set()
    lone = _alone(rest) if what.bias != "none" else set()
    inside = {n for n in rest if n.rpartition(".")[0] in anatomy.norms and n not in lone}
    norms = _norms(anatomy, inside, folder)
    rest = [n for n in rest if n not in inside]
    if lone:
        norms += _bitfit(anatomy, lone, folder)
        rest = [n for n in rest if n not in lone]
    single = [n.removesuffix(".weight") for n in rest if n.endswith(".weight")]
    if len(single) != len(rest):
        odd = next(n for n in rest if not n.endswith(".weight"))
        raise FormatError(f"{folder} trained {odd} whole; besides a head and norms, only modules "
                          "that are one weight can be read")
    if single:
        norms.append(make("full", {"targets": expression(anatomy, single, folder)}))
    return bool(head & set(what.whole)), norms


def _bitfit(anatomy: Anatomy, names: set[str], folder: str | Path) -> list[Method]:
    """The part that trains exactly these biases."""
    every = _biases(anatomy)
    if names == every:
        return [make("bitfit", {})]
    text = ",".join(sorted(n.removesuffix(".bias") for n in names))
    try:
        if set(tensors(anatomy, text, every, siblings=True)) == names:
            return [make("bitfit", {"targets": text})]
    except TargetError:
        pass
    raise FormatError(f"{folder} trained {sorted(names)[0]}, but neither all biases nor its weight")


def _norms(anatomy: Anatomy, names: set[str], folder: str | Path) -> list[Method]:
    """The part that trains exactly these parameters of norms, if there are any."""
    if not names:
        return []
    every = {f"{path}.{leaf}" if path else leaf for path in anatomy.norms for leaf, _ in
             anatomy.model.get_submodule(path).named_parameters(recurse=False)}
    if names == every:
        return [make("norms", {})]
    owners = list(dict.fromkeys(n.rpartition(".")[0] for n in sorted(names)))
    last = ",".join(dict.fromkeys(o.rpartition(".")[2] for o in owners))
    for text in (last, ",".join(owners)):
        try:
            found = tensors(anatomy, text, every, siblings=True)
        except TargetError:
            continue
        if set(found) == names:
            return [make("norms", {"targets": text})]
    raise FormatError(f"{folder} trained {sorted(names)[0]}, but not all of the norm it belongs to")


