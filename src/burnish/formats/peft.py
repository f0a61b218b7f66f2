"""To PEFT: LoRA, rsLoRA, DoRA, MiSS and the table of peft_forms.py as `peft` stores them (and
back: peft_load.py).

Every update that is a product of factors has an exact LoRA form: slices of a fused projection
become one pair with zero rows, several terms on one matrix are stacked, PiSSA becomes twice its
rank. What PEFT has a type of its own for keeps it where the whole adapter is of it. What has no
form is refused, or approximated at a rank the caller names.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..blocks.state.gates import Shift
from ..blocks.weight.factor import Chain
from ..blocks.weight.factor_algebra import Factors, cat, truncate
from ..blocks.weight.magnitude import Magnitude
from ..blocks.weight.provided import Term, Wrap
from ..blocks.weight.tokens import Tokens
from ..core.anatomy import Anatomy
from ..core.errors import FormatError
from ..core.site import Place
from ..engine.slot import Slot, slots
from ..engine.tuned import Tuned
from . import peft_experts, peft_files, peft_lora, peft_prompts, peft_tied, peft_whole
from .card import code
from .peft_folder import Lora, PeftFolder
from .peft_forms import TOKENS
from .peft_load import load_peft
from .peft_own import Own
from .peft_types import as_miss, as_own, check_plain, counts

__all__ = ["collected", "export_peft", "load_peft", "lora_form"]

_KINDS = {"linear": "linear", "conv1d": "linear", "embedding": "embedding", "conv": "conv"}
_WRITES = "ForConditionalGeneration"
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
    what, errors = collected(tuned, name, rank)
    names = [n for n, _ in tuned.model.named_modules() if ".burnish" not in f".{n}"]
    return peft_files.write(folder, what, names, _card(what, tuned, errors))


@torch.no_grad()
def collected(tuned: Tuned, name: str | None = None, rank: int | None = None,
              pairs: bool = False) -> tuple[PeftFolder, dict[str, float]]:
    """(what a folder says of an adapter, the relative errors of what is approximated).

    pairs: everything as pairs of factors, also what PEFT has a type of its own for.
    """
    tuned.check_ready()
    if name is not None:
        tuned.adapters.known(name)
    weights = {name: 1.0} if name else dict(tuned.state.active)
    if not weights:
        raise FormatError("per-sample adapters are several; name the one to export")
    what = PeftFolder(base=_base_name(tuned.model))
    errors: dict[str, float] = {}
    if not pairs:
        peft_prompts.as_prompt(tuned, what, weights, counts)
        as_own(tuned, what, weights, near=rank is not None)
    for path, module, slot in slots(tuned.model) if what.plain_lora else ():
        parts = _parts(slot, path, weights)
        for place, term, weight in [p for p in parts if p[0].kind == "experts"]:
            if place.name in what.experts or place.rows:
                raise FormatError(f"{place.name} has several updates, and PEFT one for a stack of "
                                  "experts; merge instead")
            what.experts[place.name] = peft_experts.stack_of(term, place, weight)
        parts = [p for p in parts if p[0].kind != "experts"]
        if len(parts) == 1 and isinstance(parts[0][1], Tokens) and parts[0][2] == 1:
            rows, said = TOKENS.give(parts[0][1], None, module, path)
            what.own[path] = Own(TOKENS.method, said, rows, form=TOKENS)
        elif parts:
            what.loras[path] = _lora(module, slot, path, parts, rank, errors)
            peft_lora.shift(what.loras[path], path, _shifts(slot, weights))
    for path in (p for p, own in what.own.items() if own.form is TOKENS):
        peft_tied.check_ends(Anatomy.of(tuned.model), path, "to export")
    if not pairs:
        as_miss(tuned, what, weights)
    _fill_dora(tuned, what)
    peft_lora.all_shift(what)
    peft_whole.gather(tuned, what, weights)
    peft_experts.name(what.experts, dict(tuned.model.named_modules()))
    if not what.modules and not what.experts and what.prompt is None:
        raise FormatError("the adapter adds to no weight: there is nothing PEFT could hold")
    settings = [m.settings() for n in weights for m in tuned.adapters[n].recipe]
    what.dropout = next((float(s["dropout"]) for s in settings if s.get("dropout")), 0.0)
    if what.experts and (what.dropout or any(x.magnitude is not None
                                             for x in what.loras.values())):
        raise FormatError("PEFT has neither dropout nor DoRA beside an update of experts")
    what.minor = {m.name for n in weights for m in tuned.adapters[n].recipe
                  if "delta" in m.axes()} == {"mica"} and what.plain_lora
    plain = what.plain_lora and not what.experts and all(
        x.kind == "linear" and x.magnitude is None for x in what.loras.values())
    velora = next((m for n in weights for m in tuned.adapters[n].recipe if m.name == "velora"),
                  None)
    what.velora = peft_lora.as_compressed(velora) if plain and velora is not None else None
    what.rslora = any(s.get("scaling") == "rs" for s in settings)
    what.fan_in_fan_out = {type(tuned.model.get_submodule(p)).__name__
                           for p in what.adapted} == {"Conv1D"}
    if what.own and what.fan_in_fan_out:
        what.settings["fan_in_fan_out"] = True
    what.task_type = _task(tuned.model, what)
    peft_prompts.check_task(what, tuned.model)
    peft_lora.replicated(tuned.model, what)
    return what, errors


def lora_form(term: Term, rank: int | None = None) -> tuple[Factors, float] | None:
    """(factors of a term, relative error): exact where it has factors, else at `rank`, or None."""
    if isinstance(term, Chain) and type(term).low_rank is Term.low_rank \
            and type(term).pair is Chain.pair:   # with its scale, which settings name
        return Factors(term.A.detach(), term.B.detach(), term.scale), 0.0
    if (known := term.low_rank()) is not None:
        return Factors(*(t.detach().contiguous() for t in known)), 0.0
    if rank is None or getattr(term, "folded", False):     # a storage has the rest of what it adds
        return None
    dense = term.final().detach().float()
    if dense.dim() != 2:
        return None
    r = min(rank, *dense.shape)
    whole = Factors(torch.eye(dense.shape[1], device=dense.device), dense)
    got = truncate(whole, r)
    return got, float((got.dense() - dense).norm() / dense.norm().clamp_min(1e-30))


_Parts = list[tuple[Place, Term, float]]


def _parts(slot: Slot, path: str, weights: dict[str, float]) -> _Parts:
    out: _Parts = []
    beside = any(p.place is not None and p.adapter in weights for p in slot.parts)
    for part in slot.parts:
        if part.adapter not in weights or not counts(slot.module_of(part)) \
                or beside and isinstance(slot.module_of(part), Shift):     # lora_bias
            continue
        if part.place is None:
            raise FormatError(f"{part.key} at {path or 'the root'} computes on hidden states; PEFT "
                              "folders hold updates of weights. Drop it from the recipe to export")
        if part.place.kind != "experts" and (part.place.kind not in _KINDS
                                             or part.place.param != "weight"):
            raise FormatError(f"{part.key} updates {part.place.name} (kind {part.place.kind}); "
                              "PEFT adapts the weight of a module of its own")
        out.append((part.place, slot.module_of(part), weights[part.adapter]))
    return out


def _shifts(slot: Slot, weights: dict[str, float]) -> list[tuple[Shift, float]]:
    """What is added to a module's outputs, beside updates of its weight."""
    return [(slot.module_of(p), weights[p.adapter]) for p in slot.parts
            if p.adapter in weights and isinstance(slot.module_of(p), Shift)]


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
        made = lora_form(term, rank) if not isinstance(term, Wrap) else \
            _around(term, place.view(slot._stored(module, "weight"))) \
            if weight == 1 and sum(p.rows == place.rows for p, _, _ in parts) == 1 else None
        if made is None:
            kind = type(term).__name__.lower()
            raise FormatError(
                f"{place.name}: {kind} has no exact LoRA form" + (
                    "" if isinstance(term, Wrap) or getattr(term, "folded", False)
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


def _around(term: Wrap, V: Tensor) -> tuple[Factors, float] | None:
    """(factors of ``W' - W``, 0) of a function of W that differs from it by few components."""
    known = term.low_rank_of(V.detach())
    return None if known is None else (Factors(*(t.detach().contiguous() for t in known)), 0.0)


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


def _task(model: nn.Module, what: PeftFolder) -> str | None:
    """For classification PEFT expects the head in the folder: named only where it is there."""
    kind = next((t for end, t in _TASKS.items() if type(model).__name__.endswith(end)), None)
    if what.prompt is not None and type(model).__name__.endswith(_WRITES):
        return "SEQ_2_SEQ_LM"
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
