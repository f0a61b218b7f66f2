"""What a model is made of: its weight matrices and their roles, its blocks, its two ends.

:meth:`Anatomy.of` reads modules, shapes and names, never a value, so it works on meta and fake
models and needs no forward. Names are interpreted by ``core/families.py``; what they do not tell
is read off shapes, and ``notes`` says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from . import families
from .asked import Asked
from .denoisers import is_denoiser
from .example import example_batch
from .places import Found, matrices
from .site import Place
from .stacks import Block, blocks_of

__all__ = ["Anatomy", "Block", "example_batch"]


@dataclass
class Anatomy:
    """A model read once.

    places: every weight matrix, whole, in module order; ``Place.block`` is the position in
        `blocks`. Runs of rows of a fused weight come from :meth:`slices`.
    head: modules whose parameters are the task head; head_kind: "classification" (trains with
        the recipe), "lm" and a denoiser's "noise" (stay frozen) or "none".
    embeddings: modules that turn inputs into states (token embeddings, patch projections).
    final_norm: the norm after the last block; final_norms: the same per stack.
    aliases: tied parameter -> the name under which it is a place.
    again: weight of a block that is run again -> the name under which it is the first time. A place
        of its own at each, since each run is a module with its own adapter.
    past: modules whose weight another one reads past them.
    asking: parameters that asked for a gradient when the model was read, by name.
    notes: what was guessed or left out.
    asked: the targets of the recipe that is being joined, and who has used them.
    """

    model: nn.Module
    places: list[Place] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    head: tuple[str, ...] = ()
    head_kind: str = "none"
    final_norm: str | None = None
    final_norms: dict[str, str] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    hidden_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    again: dict[str, str] = field(default_factory=dict)
    past: frozenset[str] = frozenset()
    asking: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    asked: Asked = field(default_factory=Asked)

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Read `model`. Cheap: no forward, no value of any tensor."""
        return _Reader(model).read()

    # -- asking -------------------------------------------------------------------------------
    def slices(self, place: Place) -> tuple[Place, ...]:
        """q, k and v of a fused place (or gate and up) as runs of its rows; () where it is not
        fused or its parts are interleaved."""
        base = place.role.removeprefix("cross_")
        if base not in families.FUSED or place.rows or self.interleaved(place):
            return ()
        block = self.blocks[place.block] if place.block is not None else None
        heads, kv = (block.heads, block.kv_heads) if block else (self.heads, self.kv_heads)
        above = self.model.get_submodule(place.path.rpartition(".")[0])
        return tuple(replace(place, role=role, rows=rows, out=rows[1] - rows[0])
                     for role, rows in families.runs(place.role, place.out, heads, kv,
                                                     families.gate_last(above)))

    def interleaved(self, place: Place) -> bool:
        """Its parts alternate along the rows, so no run of rows is one of them."""
        full = f"{place.path}.{place.param}".removesuffix(".weight")
        if place.kind == "experts":
            return not getattr(self.model.get_submodule(place.path), "is_concatenated", True)
        return families.interleaved(_model_type(self.model), full.rpartition(".")[2])

    def tied(self, place: Place) -> tuple[str, ...]:
        """Other names of the same parameter. Modules under those names read it too: what is
        added on the place's own module does not reach them."""
        name = f"{place.path}.{place.param}" if place.path else place.param
        return tuple(alias for alias, first in self.aliases.items() if first == name)

    def ends(self, place: Place) -> tuple[Place, ...]:
        """The other modules that read a tied table: as a table, or as the matrix of a linear; ()
        where one of them reads it in any other way, or nothing is tied."""
        found = []
        for name in self.tied(place):
            path, _, param = name.rpartition(".")
            module = self.model.get_submodule(path)
            if place.kind != "embedding" or param != "weight" or path in self.past:
                return ()
            if isinstance(module, nn.Embedding):
                found.append(replace(place, path=path))
            elif isinstance(module, nn.Linear):
                found.append(replace(place, path=path, kind="linear", out=place.inp,
                                     inp=place.out, role="head", transposed=False))
            else:
                return ()
        return tuple(found)

    def in_head(self, place: Place) -> bool:
        """It belongs to the task head."""
        return any(place.path == h or place.path.startswith(f"{h}.") for h in self.head)

    def stacks(self) -> dict[str, list[Block]]:
        """Blocks by stack, in order."""
        out: dict[str, list[Block]] = {}
        for b in self.blocks:
            out.setdefault(b.stack, []).append(b)
        return out


    def runs(self) -> list[list[Block]]:
        """The blocks of each stack in the order they run; stages that follow each other (Swin's)
        are one run."""
        out: dict[str, list[Block]] = {}
        for b in self.blocks:
            out.setdefault(re.sub(r"\d+", "*", b.stack), []).append(b)
        return list(out.values())

    def encoder_decoder(self) -> tuple[str, str] | None:
        """(stack that encodes, stack whose blocks attend to it) where those are the stacks."""
        reads = {stack: [b.cross is not None for b in blocks]
                 for stack, blocks in self.stacks().items()}
        plain = [s for s, cross in reads.items() if not any(cross)]
        crossed = [s for s, cross in reads.items() if all(cross)]
        return (plain[0], crossed[0]) if len(plain) == len(crossed) == 1 and len(reads) == 2 \
            else None


class _Reader:
    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = {p: m for p, m in model.named_modules()
                        if "burnish" not in p.split(".")}
        self.notes: list[str] = []

    def read(self) -> Anatomy:
        blocks = blocks_of(self.modules)
        found = matrices(self.modules, [b.path for b in blocks])
        norms = tuple(p for p, m in self.modules.items() if _is_norm(m))
        head, kind = self._head(blocks, found)
        for place in found.places:
            if any(place.path == h or place.path.startswith(f"{h}.") for h in head) \
                    and place.kind != "embedding":
                found.roles[place] = "head"
        places = [replace(p, role=found.roles[p]) for p in found.places]
        blocks = [self._sites(i, b, places, norms) for i, b in enumerate(blocks)]
        out = Anatomy(self.model, places, blocks, head, kind, norms=norms,
                      aliases=found.aliases, again=found.again, past=frozenset(found.past),
                      notes=[*self.notes, *found.notes],
                      asking=tuple(n for n, p in self.model.named_parameters()
                                   if p.requires_grad and ".burnish." not in f".{n}"))
        out.embeddings = tuple(dict.fromkeys(
            p.path for p in places if p.role in ("embed", "patch") and p.block is None))
        self._numbers(out)
        self._final_norms(out)
        if unknown := [p for p in places if not p.role and p.block is not None]:
            out.notes.append(f"{len(unknown)} weights have names that tell no role, e.g. "
                             f"{unknown[0].name}; they are targeted by name")
        return out

    # -- inside a block -----------------------------------------------------------------------
    def _sites(self, number: int, block: Block, places: list[Place],
               norms: tuple[str, ...]) -> Block:
        mine = [p for p in places if p.block == number]
        by: dict[str, list[Place]] = {}
        for p in mine:
            by.setdefault(p.role, []).append(p)

        def some(*roles: str) -> list[Place]:
            return [p for r in roles for p in by.get(r, ()) if p.kind != "experts"]

        def owner(roles: tuple[str, ...]) -> str | None:
            paths = [p.path if p.kind in ("mha", "experts") else p.path.rpartition(".")[0]
                     for p in mine if p.role in roles]
            top = _common(paths)
            while top and type(self.modules.get(top)) in (nn.ModuleList, nn.ModuleDict):  # not run
                top = top.rpartition(".")[0]
            whole = families.ATTENTION_CLASS.search(type(self.modules[block.path]).__name__)
            return top if paths and (top != block.path or whole) else None

        attn, cross = owner(families.ATTENTION), owner(families.CROSS)
        outs, cross_outs = some("o"), some("cross_o")
        moe = any(p.kind == "experts" for p in mine) or "router" in by
        mlp_roles = (*families.MLP, "router") if moe else families.MLP
        heads, kv = self._head_counts(attn, by)
        return replace(
            block, attn=attn, attn_out=outs[-1].path if outs else None, cross=cross,
            cross_out=cross_outs[-1].path if cross_outs else None,
            mixer=attn or owner(families.MIXER),
            mlp_in=() if moe else tuple(p.path for p in some("fc1", "gate", "gate_up", "up")),
            mlp_out=None if moe or not some("fc2", "down") else some("fc2", "down")[-1].path,
            mlp=owner(mlp_roles),
            norms=tuple(n for n in norms if n.startswith(f"{block.path}.")),
            hidden_size=next((p.out for p in [*outs[-1:], *some("fc2", "down", "out_proj")]), None),
            heads=heads, kv_heads=kv)

    def _head_counts(self, attn: str | None, by: dict[str, list[Place]]
                     ) -> tuple[int | None, int | None]:
        """Query and key heads: said by the attention module, its widths, or a config."""
        if attn is None:
            return None, None
        inside = [m for p, m in self.modules.items() if p == attn or p.startswith(f"{attn}.")]
        heads = _attribute(inside, families.HEAD_COUNT)
        kv = _attribute(inside, families.KV_COUNT)
        width = _attribute(inside, ("head_dim", "key_value_proj_dim", "attention_head_size"))
        if width and "q" in by and by["q"][0].out % width == 0:
            heads = by["q"][0].out // width
        configs = [c for m in inside if (c := getattr(m, "config", None)) is not None]
        heads = heads or _attribute([*configs, *_configs(self.model)], families.HEAD_COUNT)
        if heads and "q" in by and "k" in by and by["q"][0].out % heads == 0:
            per = by["q"][0].out // heads
            kv = by["k"][0].out // per or None
        kv = kv or _attribute(configs, families.KV_COUNT)
        return heads, kv or heads

    # -- the two ends -------------------------------------------------------------------------
    def _head(self, blocks: list[Block], found: Found) -> tuple[tuple[str, ...], str]:
        model = self.model
        base = getattr(model, "base_model", None)
        if isinstance(base, nn.Module) and hasattr(model, "config"):
            cls = type(model).__name__
            if not families.TASK.search(cls):
                return (), "none"
            if base is not model:
                inside = {id(m) for m in base.modules()}
                head = self._owners(lambda p, m: id(m) not in inside)
            else:
                head = self._owners(lambda p, m: p.split(".")[0] in families.HEADS)
            if not head:
                said = getattr(model, "get_output_embeddings", lambda: None)()
                head = self._owners(lambda p, m: m is said)
            vocabulary = {p.inp for p in found.places if found.roles[p] == "embed"}
            wide = [m.out_features for p, m in self.modules.items()
                    if p in head and isinstance(m, nn.Linear)]
            lm = families.LM.search(cls) and any(w in vocabulary for w in wide)
            return head, ("lm" if lm else "classification") if head else "none"
        if callable(classifier := getattr(model, "get_classifier", None)):    # timm says it itself
            top = classifier()
            inside = {id(m) for m in top.modules()} if isinstance(top, nn.Module) else set()
            head = self._owners(lambda p, m: id(m) in inside)
            return head, "classification" if head else "none"
        in_block = tuple(f"{b.path}." for b in blocks)
        head = self._owners(lambda p, m: p.split(".")[0] in families.HEADS
                            and not p.startswith(in_block))
        if len(head) == len(self._owners(lambda p, m: True)):
            head = ()                                                  # nothing else is there
        if not head and len(found.places) > 1:
            last = found.places[-1]
            if last.kind == "linear" and last.block is None and last.out != last.inp:
                head = (last.path,)
                self.notes.append(f"the head is guessed: {last.path}, the last linear layer")
        if not head:
            return (), "none"
        if is_denoiser(model):                                 # it tells noise, before and after
            return head, "noise"
        vocabulary = {p.inp for p in found.places if found.roles[p] == "embed"}
        last_linear = [p for p in found.places if p.path in head and p.kind == "linear"]
        lm = any(p.out in vocabulary for p in last_linear) or \
            any(alias.rpartition(".")[0] in head for alias in found.aliases)
        return head, "lm" if lm else "classification"

    def _owners(self, wanted: Callable[[str, nn.Module], bool]) -> tuple[str, ...]:
        return tuple(p for p, m in self.modules.items()
                     if p and m._parameters and wanted(p, m))

    def _final_norms(self, a: Anatomy) -> None:
        order = {p: i for i, p in enumerate(self.modules)}
        for stack, blocks in a.stacks().items():
            inside = tuple(f"{b.path}." for b in a.blocks)
            last = order[blocks[-1].path]
            good = [n for n in a.norms if not n.startswith(inside) and n not in a.head
                    and not re.search("embed|downsampl", n)
                    and _holds(n.rpartition(".")[0], stack)]
            after = [n for n in good if order[n] > last]
            named = [n for n in good if n.rpartition(".")[2] in families.FINAL_NORM]
            if pick := after[:1] or named[-1:]:
                a.final_norms[stack] = pick[0]
        if a.blocks:
            a.final_norm = a.final_norms.get(a.blocks[-1].stack)

    def _numbers(self, a: Anatomy) -> None:
        configs = _configs(self.model)
        last = a.blocks[-1] if a.blocks else None
        a.hidden_size = (last.hidden_size if last else None) or _attribute(configs, families.WIDTH)
        if a.hidden_size is None:                                # what the head reads
            a.hidden_size = next((p.inp for p in a.places if a.in_head(p)), None)
        if a.hidden_size is None:
            wide = Counter(p.out for p in a.places if not a.in_head(p) and p.kind != "embedding")
            if wide:
                a.hidden_size = wide.most_common(1)[0][0]
        a.heads = (last.heads if last else None) or _attribute(configs, families.HEAD_COUNT) \
            or _attribute(list(self.modules.values()), ("num_heads",))
        a.kv_heads = (last.kv_heads if last else None) or a.heads


# -- small things ---------------------------------------------------------------------------------
def _is_norm(m: nn.Module) -> bool:
    named = "norm" in type(m).__name__.lower()
    return bool(m._parameters) and named and \
        all(p is None or p.dim() == 1 for p in m._parameters.values())


def _common(paths: list[str]) -> str:
    """The deepest module above all of them."""
    split = [p.split(".") for p in paths]
    out = []
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        out.append(column[0])
    return ".".join(out)


def _holds(parent: str, stack: str) -> bool:
    return not parent or stack == parent or stack.startswith(f"{parent}.")


def _configs(model: nn.Module) -> list[object]:
    config = getattr(model, "config", None)
    if config is None:
        return []
    return [config, *(c for n in ("text_config", "vision_config", "decoder", "encoder")
                      if (c := getattr(config, n, None)) is not None)]


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _attribute(things: list, names: tuple[str, ...]) -> int | None:
    """The first whole number among these attributes."""
    for thing in things:
        for name in names:
            value = getattr(thing, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
