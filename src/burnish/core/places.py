"""Every weight matrix of a model as a :class:`Place`: kind, shape, role, block."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import families
from .site import Place

_MIXES = re.compile("quer|key|value|attn|attention|conv")
_QKV = re.compile(r"q\w*k\w*v\w*$")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass
class Found:
    """places carry no role yet: it stands in `roles`, since siblings and heads can change it."""

    places: list[Place] = field(default_factory=list)
    roles: dict[Place, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    again: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    past: set[str] = field(default_factory=set)          # modules whose weight another reads


def matrices(modules: dict[str, nn.Module], blocks: list[str]) -> Found:
    """The places of `modules` (path -> module); `blocks` are the paths of the blocks."""
    reader = _Matrices(modules, blocks)
    for path, module in modules.items():
        reader.visit(path, module)
    reader.others()
    reader.by_shape()
    reader.gated()
    return reader.found


class _Matrices:
    def __init__(self, modules: dict[str, nn.Module], blocks: list[str]):
        self.modules, self.found = modules, Found()
        self.numbers = {b: i for i, b in enumerate(blocks)}
        self.first: dict[int, str] = {}             # id of a parameter -> its first name
        self.past: dict[str, str] = {}              # child -> module that reads its weight
        for path, module in modules.items():
            for child in _read_past(module):
                self.found.past.add(f"{path}.{child}" if path else child)
                self.past[f"{path}.{child}" if path else child] = path

    # -- one module ---------------------------------------------------------------------------
    def visit(self, path: str, m: nn.Module) -> None:
        if isinstance(m, nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if (w := m._parameters.get(name)) is not None:
                    self.add(path, name, "mha", w.shape[0], w.shape[1], leaf=name)
            for name in ("bias_k", "bias_v"):
                if getattr(m, name, None) is not None:
                    self.found.notes.append(f"{path}.{name} is a token of its own, no matrix")
        elif isinstance(m, nn.Linear):
            self.matrix(path, m, "linear", m.out_features, m.in_features)
        elif type(m).__name__ == "Conv1D" and hasattr(m, "nx"):   # transformers'
            self.matrix(path, m, "conv1d", getattr(m, "nf", 0), getattr(m, "nx", 0),
                        transposed=True)
        elif isinstance(m, _CONVS):
            self.matrix(path, m, "conv", m.out_channels,
                        m.in_channels // m.groups * math.prod(m.kernel_size),
                        transposed=isinstance(m, _TRANSPOSED), axes=m.kernel_size, groups=m.groups)
        elif isinstance(m, nn.Embedding):
            self.matrix(path, m, "embedding", m.embedding_dim, m.num_embeddings, transposed=True)
        elif isinstance(m, nn.RNNBase):
            self.found.notes.append(f"{path} is recurrent: it reads its weights as one block, so "
                                    "they are no places")
        else:
            self.bare(path, m)

    def matrix(self, path: str, m: nn.Module, kind: str, out: int, inp: int,
               transposed: bool = False, **kernel: Any) -> None:
        if "weight" not in m._parameters:
            self.found.notes.append(
                f"{path} computes its weight from other tensors (weight_norm and its like), so it "
                "is no place; torch.nn.utils.parametrize.remove_parametrizations (or "
                "remove_weight_norm) makes it a plain one")
            return
        w = m._parameters.get("weight")
        if w is not None and w.numel() != out * inp:
            self.found.notes.append(f"{path} holds its weight packed ({tuple(w.shape)} for "
                                    f"{out} x {inp}), so it is no place")
            return
        if path in self.past:
            above = self.past[path]
            param = f"{path[len(above) + 1:] if above else path}.weight"
            self.add(above, param, "conv" if kind == "conv" else "mha", out, inp,
                     leaf=param.removesuffix(".weight"), transposed=transposed, **kernel)
        else:
            self.add(path, "weight", kind, out, inp, transposed=transposed, **kernel)

    def bare(self, path: str, m: nn.Module) -> None:
        """Matrices that a module of its own kind owns: routers, and experts in three dimensions."""
        for name, w in m._parameters.items():
            if w is None or isinstance(w, nn.parameter.UninitializedParameter):
                continue
            if w.dim() == 3 and name != "weight" and self.is_experts(path, name):
                turned = self.turned(path, m, name, w)
                E, a, b = w.shape
                self.add(path, name, "experts", *((b, a) if turned else (a, b)), leaf=name,
                         experts=E, transposed=turned)
            elif w.dim() == 2 and name == "weight" and self.role(path, "linear") == "router":
                self.add(path, name, "linear", *w.shape)

    def others(self) -> None:
        """Names of tied parameters in modules that are no place."""
        for path, m in self.modules.items():
            for leaf, p in m._parameters.items():
                full, first = (f"{path}.{leaf}" if path else leaf), self.first.get(id(p))
                if p is not None and first is not None and full != first \
                        and full not in self.found.again:
                    self.found.aliases.setdefault(full, first)

    # -- roles ----------------------------------------------------------------------------------
    def block_of(self, path: str) -> str | None:
        parts = path.split(".")
        for i in range(len(parts), 0, -1):
            if (head := ".".join(parts[:i])) in self.numbers:
                return head
        return None

    def role(self, path: str, kind: str) -> str:
        parts = path.split(".")
        above = [self.modules.get(".".join(parts[:i])) for i in range(1, len(parts))]
        classes = ["" if m is None else "MambaMixer" if "A_log" in m._parameters
                   else type(m).__name__ for m in above]
        moe = any(m is not None and "experts" in m._modules for m in above)
        crossed = any(getattr(m, "is_cross_attention", False) is True for m in above)
        return families.role(path, classes, kind, self.block_of(path), moe, crossed)

    def is_experts(self, path: str, name: str) -> bool:
        return "expert" in type(self.modules[path]).__name__.lower() or \
            "experts" in path.split(".")

    def turned(self, path: str, m: nn.Module, name: str, w: torch.Tensor) -> bool:
        """(experts, in, out)? Said by the module, else told from the block's width."""
        said = getattr(m, "is_transposed", None)
        if isinstance(said, bool):
            return said
        down = families.LEAVES["mlp"].get(name) in ("down", "fc2")
        block = self.block_of(path)
        widths = [n.shape[0] for p, mod in self.modules.items()
                  if block and p.startswith(f"{block}.") and "norm" in type(mod).__name__.lower()
                  for n in mod._parameters.values() if n is not None and n.dim() == 1]
        if widths and w.shape[1] != w.shape[2]:
            return (w.shape[2] if down else w.shape[1]) == widths[0]
        self.found.notes.append(f"{path}.{name} is taken as (experts, out, in)")
        return False

    def add(self, path: str, param: str, kind: str, out: int, inp: int, leaf: str = "",
            experts: int = 0, transposed: bool = False, axes: tuple[int, ...] = (),
            groups: int = 1) -> None:
        full = f"{path}.{param}" if path else param
        owner = self.modules[path]
        *parents, last = param.split(".")
        for p in parents:
            owner = getattr(owner, p)
        tensor = owner._parameters.get(last)
        if tensor is not None:
            alias = self.first.setdefault(id(tensor), full)
            if alias != full and self.runs_again(full, alias):
                self.found.again[full] = alias
            elif alias != full:
                self.found.aliases[full] = alias
                self.found.notes.append(f"{full} is tied to {alias}: one weight, under that name")
                return
        named = ".".join(x for x in (path, leaf) if x) if leaf else path
        block = self.block_of(path)
        place = Place(path, param, kind, out, inp, block=self.numbers[block] if block else None,
                      experts=experts, transposed=transposed, kernel=math.prod(axes), axes=axes,
                      groups=groups)
        self.found.places.append(place)
        self.found.roles[place] = self.role(named, kind)

    def runs_again(self, full: str, first: str) -> bool:
        """Is it the same weight of a block that is run once more (engine/repeat.py)?"""
        here, there = self.block_of(full), self.block_of(first)
        return here is not None and there is not None and here != there \
            and here.rpartition(".")[0] == there.rpartition(".")[0] \
            and full.removeprefix(here) == first.removeprefix(there)

    # -- siblings -------------------------------------------------------------------------------
    def _families(self) -> dict[str, list[Place]]:
        """Places by the module that holds them together."""
        out: dict[str, list[Place]] = {}
        for p in self.found.places:
            parent = p.path if p.kind in ("mha", "experts") else p.path.rpartition(".")[0]
            if self.found.roles[p] == "gate_up" and families.gate_last(self.modules[parent]):
                parent = parent.rpartition(".")[0]       # beside what it is one operation of
            out.setdefault(parent, []).append(p)
        return out

    def gated(self) -> None:
        """An MLP with a gate ends in `down`; one without has fc1 and fc2, whatever their names."""
        roles = self.found.roles
        for together in self._families().values():
            has = {roles[p] for p in together}
            gate = has & {"gate", "gate_up"}
            rename = {"fc2": "down"} if gate else {"up": "fc1", "down": "fc2"}
            if gate and "up" not in has and "gate_up" not in has:
                rename["fc1"] = "up"
            for p in together:
                roles[p] = rename.get(roles[p], roles[p])

    def by_shape(self) -> None:
        """Names that tell nothing inside an MLP or an attention: wide is fc1, narrow fc2."""
        roles = self.found.roles
        told: dict[str, list[Place]] = {}
        for parent, together in self._families().items():
            dull = [p for p in together if not roles[p] and p.kind in ("linear", "conv1d")]
            if not dull or self.block_of(f"{parent}.x") is None:
                continue
            what = self.context(dull[0].path)
            for p in dull:
                leaf = p.path.rpartition(".")[2]
                if what == "mlp" and p.out != p.inp and len(dull) <= 2 \
                        and not _MIXES.search(".".join(p.path.split(".")[-2:])):
                    roles[p] = "fc1" if p.out > p.inp else "fc2"
                elif what == "attention" and p.out == 3 * p.inp and _QKV.search(leaf):
                    roles[p] = "qkv"
                else:
                    continue
                told.setdefault(roles[p], []).append(p)
        for role, places in told.items():
            first = places[0]
            self.found.notes.append(f"{len(places)} weights are taken for {role} by their shape, "
                                    f"e.g. {first.name} ({first.out} x {first.inp})")

    def context(self, path: str) -> str:
        parts = path.split(".")
        classes = [type(self.modules[".".join(parts[:i])]).__name__ for i in range(1, len(parts))]
        return families.context(path, classes, self.block_of(path))


def _read_past(m: nn.Module) -> tuple[str, ...]:
    """Children whose weight this module reads itself."""
    names = families.BYPASS.get(type(m).__name__, ())
    if "A_log" in m._parameters:
        names = families.MIXER_BYPASS
    return tuple(n for n in names if n in m._modules)
