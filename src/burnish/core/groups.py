"""Units that stand or fall together: what structured pruning may take out of a model.

A unit of an MLP is one inner channel: a row of up (and gate), a column of down. A unit of an
attention is one key-value head with the query heads that read it: rows of q, k and v, columns of
o. Its only way out leads through those columns, so a unit whose columns read zeros is gone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from .anatomy import Anatomy
from .site import Place

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
