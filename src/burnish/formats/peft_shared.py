"""PEFT's types whose matrices all read what stands once beside them (see peft_own.py).

    VBLORA     vblora_logits_A (r, in / width, vectors), vblora_logits_B (out / width, r, vectors),
               or, of the k largest, ..._topk_indices (..., k) and ..._topk_weights (..., k - 1);
               base_model.vblora_vector_bank (vectors, width)
    UNILORA    base_model.unilora_theta_d (n,) and nothing else: `target_modules` say where; or
               unilora_indices_A (r, in), _B (out, r) and unilora_scales_A, _B too
    TINYLORA   tinylora_A (r, in), tinylora_B (out, r), tinylora_P (u, r, r);
               base_model.tinylora_v.N (u,), one for each group of matrices
    LILY       lily_A.weight (r, in), lily_B.weight (experts r, out), lily_router.weight (experts,
               r), with every module, whoever shares them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.weight.banked import Assigned, Banked
from ..blocks.weight.between import Steered
from ..blocks.weight.blended import Blended
from ..core.errors import FormatError
from ..core.method import Method
from ..core.patterns import Pattern
from ..core.reading import shown
from .peft_own import Form, Held, Own, Said, Tensors

if TYPE_CHECKING:
    from .peft_folder import PeftFolder


class Vblora(Form):
    kind, method, terms, gpt2, pairs = "VBLORA", "vblora", (Banked,), True, True
    tensors = {f"vblora_logits_{side}{rest}": Held(side.lower(), (3,)) for side in "AB"
               for rest in ("_topk_indices", "_topk_weights", "")}
    beside = {"vblora_vector_bank": Held("bank")}
    settings = {"r": Said("rank", "count", 4), "num_vectors": Said("vectors", "count", 256),
                "vector_length": Said("span", "count", 256), "topk": Said("k", "count", 2),
                "vblora_dropout": Said("dropout", "number", 0.0),
                "init_vector_bank_bound": Said("start", "number", 0.02),
                "init_logits_std": Said("std", "number", 0.1),
                "save_only_topk_weights": Said(None, "flag", False)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said = method.settings()
        return {f"vblora_logits_{side}": getattr(term, side.lower()).detach() for side in "AB"}, {
            n: said[s.ours] if s.ours else s.default for n, s in self.settings.items()}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        return {side.lower(): self._logits(own, f"vblora_logits_{side}") for side in "AB"}

    def _logits(self, own: Own, name: str) -> Tensor:
        if not own.said["save_only_topk_weights"]:
            return own.tensors[name]
        at, first = own.tensors[f"{name}_topk_indices"], own.tensors[f"{name}_topk_weights"]
        weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)
        if at.shape != weights.shape:
            raise FormatError(f"{name} has {list(at.shape)} indices and {list(weights.shape)} "
                              "weights")
        best = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        rest = best.amin(-1, keepdim=True) - 1   # what was not saved counted nothing
        logits = rest.expand(*rest.shape[:-1], own.settings["vectors"])
        return logits.scatter(-1, at.long(), best)


class Unilora(Form):
    kind, method, terms, gpt2, pairs = "UNILORA", "unilora", (Assigned,), True, True
    bare = True
    tensors = {f"unilora_{what}_{side}": Held(f"{what}.{side}") for what in ("indices", "scales")
               for side in "AB"}
    beside = {"unilora_theta_d": Held("theta", (1,))}
    settings = {"r": Said("rank", "count", 4), "theta_d_length": Said("dimension", "count", 256),
                "unilora_dropout": Said("dropout", "number", 0.0),
                "init_theta_d_bound": Said("start", "number", 0.02),
                "proj_seed": Said("seed", "whole", 42), "save_indices": Said(None, "flag", False)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said = method.settings()
        return {}, {n: said[s.ours] if s.ours else s.default for n, s in self.settings.items()}

    def check_all(self, terms: list[Any]) -> None:
        first = [t.first for t in terms]
        if first[0] != 0 or first != sorted(first) or sum(
                t.rank * (t.inp + t.out) for t in terms) != terms[0].shared.index.numel():
            raise FormatError("PEFT deals UNILORA's numbers over the modules in their order, and "
                              "this adapter has others too, or another order")

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        scales = term.scales()
        for side, at in zip("AB", term.at() if own.tensors else (), strict=False):
            for what, mine in (("indices", at), ("scales", scales[at.long()])):
                theirs = own.tensors[f"unilora_{what}_{side}"]
                if (theirs.shape != mine.shape or not torch.allclose(
                        theirs.to(mine.device, torch.float64), mine.double(), rtol=1e-2, atol=0.1)):
                    raise FormatError(f"unilora_{what}_{side} is not what proj_seed = "
                                      f"{own.settings['seed']} deals")
        return {}


class Tinylora(Form):
    kind, method, terms, gpt2, pairs = "TINYLORA", "tinylora", (Steered,), True, True
    layers = (nn.Linear, nn.Embedding)
    tensors = {"tinylora_A": Held("R"), "tinylora_B": Held("L"), "tinylora_P": Held("P", (3,))}
    settings = {"r": Said("rank", "count", 2), "u": Said("dimension", "count", 64),
                "weight_tying": Said("tying", "number", 0.0),
                "tinylora_dropout": Said("dropout", "number", 0.0),
                "init_v_bound": Said(None, "number", 0.02),
                "projection_seed": Said("seed", "whole", 42),
                "save_projection": Said(None, "flag", True)}
    shares = True

    def stands_beside(self, names: Iterable[str]) -> Mapping[str, Held]:
        return {n: Held(f"v{n.rpartition('.')[2]}", (1,)) for n in names
                if re.fullmatch(r"tinylora_v\.\d{1,9}", n)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        said = method.settings()
        A, B, P = (getattr(term, n).detach() for n in "RLP")
        if isinstance(module, nn.Embedding):     # a table is the transpose of our matrix
            A, B, P = B.t().contiguous(), A.t().contiguous(), P.transpose(1, 2).contiguous()
        return {"tinylora_A": A, "tinylora_B": B, "tinylora_P": P}, {
            n: said[s.ours] if s.ours else s.default for n, s in self.settings.items()}

    def give_beside(self, shared: nn.Module, whole: Any) -> tuple[Tensors, dict[str, Any]]:
        return {f"tinylora_v.{n[1:]}": t.detach() for n, t in shared.named_parameters()}, {}

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        A, B = own.tensors["tinylora_A"], own.tensors["tinylora_B"]
        if own.said["save_projection"] or "tinylora_P" in own.tensors:
            P = own.tensors["tinylora_P"]
        else:
            P = term.P                           # drawn alike on both sides
        if isinstance(module, nn.Embedding):
            return {"R": B.t(), "L": A.t(), "P": P.transpose(1, 2).clone()}
        return {"R": A, "L": B, "P": P}

    def values_beside(self, tensors: Tensors, shared: nn.Module) -> Tensors:
        wanted = [n for n, _ in shared.named_parameters()]
        there = {held.name: tensors[n] for n, held in self.stands_beside(tensors).items()}
        if odd := set(there) ^ set(wanted):
            raise FormatError(f"the settings make {len(wanted)} groups of matrices, and tinylora_v."
                              f"{min(odd)[1:]} is {'one more' if min(odd) in there else 'missing'}")
        return there


class Lily(Form):
    kind, method, terms = "LILY", "lily", (Blended,)
    tensors = {"lily_A.weight": Held("A"), "lily_B.weight": Held("B"),
               "lily_router.weight": Held("router")}
    settings = {"r": Said("rank", "count", 32), "stride_A": Said("stride", "count", 1),
                "num_B": Said("experts", "count", 2), "scaling": Said("scale", "number", 1.0)}

    def give(self, term: Any, method: Method, module: nn.Module, path: str
             ) -> tuple[Tensors, dict[str, Any]]:
        if term.rows is not None:
            raise FormatError(f"{path}: PEFT's LILY adds to all outputs of a linear, here to some "
                              "rows of a fused weight")
        said = method.settings()
        return {"lily_A.weight": term.A.detach().clone(),
                "lily_B.weight": term.B.detach().flatten(0, 1).clone(),
                "lily_router.weight": term.router.detach()}, {
            n: said[s.ours] for n, s in self.settings.items()} | {
            "init_weights": True, "by size": {path: said["grouping"] == "size"}}

    def finish(self, settings: dict[str, Any]) -> dict[str, Any]:
        paths = settings.pop("by size")          # a pattern makes groups of sizes, names of names
        pattern = "^(" + "|".join(map(re.escape, sorted(paths))) + ")$"
        return settings | ({"target_modules": pattern} if any(paths.values()) else {})

    def adjust(self, own: Own, config: Mapping[str, Any], where: str) -> None:
        own.settings["scale"] = float(own.settings["scale"])
        own.settings["grouping"] = "name"

    def all_read(self, owns: Mapping[str, Own], config: Mapping[str, Any]) -> None:
        """A pattern makes a group of all that it matches in one size."""
        alike: dict[tuple[int, ...], list[Tensor]] = {}
        for own in owns.values():
            if (B := own.tensors.get("lily_B.weight")) is not None:
                alike.setdefault((*B.shape, *own.tensors.get("lily_A.weight", B).shape),
                                 []).append(B)
        if isinstance(config.get("target_modules"), str) and all(
                torch.equal(B, group[0]) for group in alike.values() for B in group):
            for own in owns.values():
                own.settings["grouping"] = "size"

    def values(self, own: Own, term: Any, module: nn.Module) -> Tensors:
        t = own.tensors
        made = {"A": t["lily_A.weight"], "router": t["lily_router.weight"],
                "B": t["lily_B.weight"].unflatten(0, (term.B.shape[0], -1))}
        for name in "AB":                        # whoever holds it was filled before
            there = getattr(term, name)
            if name not in term.owns and (made[name].shape != there.shape or not torch.equal(
                    made[name].to(there), there)):
                raise FormatError(f"lily_{name}.weight is not that of the layers which share it")
        return made


BANKS: tuple[Form, ...] = (Vblora(), Unilora(), Tinylora(), Lily())


def targeted(config: Mapping[str, Any], names: Iterable[str], where: str) -> list[str]:
    """The modules that settings of PEFT name, by its rule: the whole of a name matches, or, of a
    list, one of them is the name or its dotted end; then those of the layers asked for."""
    kinds = {n: config.get(n) for n in ("target_modules", "exclude_modules", "layers_pattern")}
    for setting, said in kinds.items():
        if not (said is None or isinstance(said, str) or isinstance(said, list)
                and all(isinstance(s, str) for s in said)):
            raise FormatError(f"{where}: {setting} = {shown(said)}; expected names or a pattern")
    wanted, out, patterns = kinds.values()
    layers, heads = config.get("layers_to_transform"), config.get("modules_to_save") or []
    kept = layers if isinstance(layers, list) else [] if layers is None else [layers]
    numbered = [r".*?\.[^.]*"] if not patterns else [
        rf"(?:.*?\.)?{re.escape(p)}" for p in
        ([patterns] if isinstance(patterns, str) else patterns)]

    def ends(name: str, said: Any) -> bool:
        if isinstance(said, str):
            return Pattern(said).fullmatch(name)
        return any(name == s or name.endswith(f".{s}") for s in said or ())

    def chosen(name: str) -> bool:
        if not ends(name, wanted) or out and ends(name, out) \
                or any(f".{h}." in f".{name}." for h in heads):
            return False
        if not kept or isinstance(wanted, str) or name in wanted:
            return True
        found = (re.match(rf"{p}\.(\d+)\.", name) for p in numbered)
        first = next((m for m in found if m), None)
        return first is not None and int(first[1]) in kept

    return [n for n in names if chosen(n)]


def place(what: PeftFolder, names: Iterable[str], folder: str | Path) -> None:
    """Find the modules of a folder that holds nothing of theirs, in the model."""
    if what.form is None or not what.form.bare or what.own:
        return
    found = targeted(what.config, names, str(folder))
    if not found:
        raise FormatError(f"{folder}: target_modules = {shown(what.config.get('target_modules'))} "
                          "names no module of this model")
    for path in found:
        what.own[path] = what.form.take({}, what.config, f"{folder}: {path}")
