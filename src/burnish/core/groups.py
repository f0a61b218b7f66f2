"""Units that stand or fall together: what structured pruning may take out of a model.

A unit of an MLP is one inner channel: a row of up (and gate), a column of down. A unit of an
attention is one key-value head with the query heads that read it: rows of q, k and v, columns of
o. Its only way out leads through those columns, so a unit whose columns read zeros is gone.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from . import families
from .anatomy import Anatomy
from .site import Place

#: attributes that count heads, of modules and of configs
HEADS = (*families.HEAD_COUNT, "n_heads")
_RELATIVE = re.compile(r"relative\w*bias|rel_pos|pos_bias")


@dataclass(frozen=True)
class Group:
    """The units of one MLP or one attention.

    rows, columns: (place, width): unit u owns rows (or columns) u width : (u + 1) width of it;
    places may be runs of rows of a fused weight.
    """

    path: str
    block: int
    kind: Literal["heads", "channels"]
    units: int
    rows: tuple[tuple[Place, int], ...]
    columns: tuple[tuple[Place, int], ...]

    @property
    def out(self) -> Place:
        """The place whose columns the units leave through."""
        return self.columns[0][0]


def groups(anatomy: Anatomy) -> tuple[list[Group], list[str]]:
    """(the groups of all blocks, why some blocks have none)."""
    found: list[Group] = []
    notes: list[str] = []
    blocks: dict[int, dict[str, list[Place]]] = defaultdict(lambda: defaultdict(list))
    for place in anatomy.places:
        if place.block is not None and place.kind in ("linear", "conv1d") \
                and place.param == "weight":
            for part in anatomy.slices(place) or (place,):
                blocks[place.block][part.role].append(part)
    for n, by in blocks.items():
        for make in (_attention, _mlp):
            made = make(anatomy, n, by)
            if isinstance(made, Group):
                found.append(made)
            elif made:
                notes.append(made)
    return found, notes


def _one(by: dict[str, list[Place]], *roles: str) -> list[Place]:
    return [by[r][0] for r in roles if len(by.get(r, ())) == 1]


def _attention(anatomy: Anatomy, n: int, by: dict[str, list[Place]]) -> Group | str:
    parts = _one(by, "q", "k", "v", "o")
    block = anatomy.blocks[n]
    if parts and (table := _table_of_heads(anatomy, block.stack)):
        return f"{table} holds a bias per head for all blocks of {block.stack}, so heads stay"
    if len(parts) < 4:
        fused = [p for p in by.get("qkv", ()) if anatomy.interleaved(p)]
        return f"{fused[0].name} interleaves q, k and v: its heads are no groups" if fused else ""
    q, k, v, o = parts
    kv = block.kv_heads or anatomy.kv_heads
    if not kv or any(p.out % kv for p in (q, k, v)) or o.inp % kv or k.out != v.out:
        return f"{block.path}: its heads are not told, so they are no groups"
    return Group(block.attn or block.path, n, "heads", kv,
                 tuple((p, p.out // kv) for p in (q, k, v)), ((o, o.inp // kv),))


def _table_of_heads(anatomy: Anatomy, stack: str) -> str | None:
    """A table of relative positions, which has a column per head."""
    return next((n for n, _ in anatomy.model.named_parameters()
                 if _RELATIVE.search(n) and n.startswith(stack.rpartition(".")[0])), None)


def _mlp(anatomy: Anatomy, n: int, by: dict[str, list[Place]]) -> Group | str:
    into, out = _one(by, "fc1", "gate", "up"), _one(by, "fc2", "down")
    if not into or len(out) != 1 or any(p.out != out[0].inp for p in into):
        return ""
    block = anatomy.blocks[n]
    return Group(block.mlp or block.path, n, "channels", out[0].inp,
                 tuple((p, 1) for p in into), ((out[0], 1),))


# -- a config of fewer heads ----------------------------------------------------------------------
def say_heads(config: Any, group: Group, alive: int) -> None:
    """Let a config name as many heads as so many units of this group have; they keep their
    width."""
    whole = next((v for n in HEADS if isinstance(v := getattr(config, n, None), int)), None)
    if getattr(config, "head_dim", None) is None and whole:
        config.head_dim = group.columns[0][1] // (whole // group.units)
    for n in (*HEADS, *families.KV_COUNT):
        value = getattr(config, n, None)
        if isinstance(value, int) and value % group.units == 0:
            setattr(config, n, value // group.units * alive)


def not_taken(anatomy: Anatomy, group: Group, alive: int) -> str | None:
    """Why the model's config does not take so many units of an attention, by its own word (a
    Llama's width is a multiple of its heads); None where it does, or says nothing."""
    config: Any = copy.deepcopy(getattr(anatomy.model, "config", None))
    if not hasattr(config, "validate"):
        return None
    say_heads(config, group, alive)
    try:
        config.validate()
    except Exception as e:                               # a foreign config may say anything
        return f"{type(config).__name__}: {str(e.__cause__ or e).splitlines()[0]}"
    return None


# -- groups of outputs ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Outputs:
    """The outputs of a matrix as it is stored (first dimension, rest), in groups.

    columns: outputs lie along the second dimension.  runs: (groups, outputs of each), in order.
    """

    columns: bool
    runs: tuple[tuple[int, int], ...]


def outputs(anatomy: Anatomy) -> dict[str, Outputs]:
    """name -> its outputs: of queries and keys by head, of values and whatever else stands in
    attention and MLPs one by one, of tables and heads token by token. Where heads are not told, or
    alternate along a fused weight, one by one too. Other matrices are left out."""
    found = {}
    for place in anatomy.places:
        if place.kind == "embedding":
            found[place.name] = Outputs(False, ((place.inp, 1),))
        elif place.kind in ("linear", "conv1d", "mha") and not place.experts and (
                anatomy.in_head(place) or _base(place) in _SINGLE):
            runs = tuple(_run(anatomy, part) for part in anatomy.slices(place) or (place,))
            found[place.name] = Outputs(place.transposed, runs)
    return found


_SINGLE = (*families.ATTENTION, *families.MLP)


def _base(place: Place) -> str:
    return place.role.removeprefix("cross_")


def _run(anatomy: Anatomy, part: Place) -> tuple[int, int]:
    block = anatomy.blocks[part.block] if part.block is not None else anatomy
    heads = {"q": block.heads, "k": block.kv_heads}.get(_base(part))
    if not heads or part.out % heads:
        return part.out, 1
    return heads, part.out // heads
