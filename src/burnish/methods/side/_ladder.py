"""Putting the ladder of lst beside a stack of blocks, and cutting its blocks out of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...blocks.state.taps import Crown, Plain, Rung, Still, shrunk
from ...blocks.weight import slicing
from ...core.errors import RecipeError
from ...core.families import rotary
from ...core.method import Method

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.site import Place
    from .lst import Lst


@dataclass(frozen=True)
class Ladder:
    """One rung beside every block of a stack (a bare one where the ladder skips it)."""

    method: Lst
    blocks: list[Block]
    kept: set[int]

    def install(self, attacher: Any, part: Method) -> None:
        self._backbone_is_frozen(attacher, part)
        m, anatomy, model = self.method, attacher.anatomy, attacher.model
        state, name = attacher.state, attacher.adapter.name
        d = self.blocks[0].hidden_size or anatomy.hidden_size
        if d is None or len({b.hidden_size for b in self.blocks}) > 1:
            raise RecipeError("lst: the blocks have different widths; a ladder has one")
        s = m.narrow(d, "the width")
        like = next(p for p in model.get_submodule(self.blocks[0].path).parameters()
                    if p.is_floating_point())
        stem = self.blocks[0].stack.split(".")
        inside = [x for p, x in model.named_modules() if p and "burnish" not in p.split(".")
                  and not any(p == h or p.startswith(f"{h}.") for h in anatomy.head)
                  and (len(stem) == 1 or p.split(".")[0] == stem[0])]
        Still(state, name, inside).listen(attacher.slot(""), part.name)
        keep = _embedding_channels(anatomy, d, s)
        for i, block in enumerate(self.blocks):
            side = None
            if i in self.kept:
                side = self._side(attacher, block, i, d, s)
                if m.init == "prune" and not isinstance(side, Plain):
                    keep = prune(anatomy, block, side, keep, m.reduction)
            rung = Rung(state, name, side, d, s, enter=i == 0)
            rung.to(device=like.device, dtype=like.dtype).listen(attacher.slot(block.path),
                                                                 part.name)
        last = anatomy.final_norms.get(self.blocks[0].stack)
        norm = slicing.cut_norm(model.get_submodule(last), keep) if last else nn.LayerNorm(s)
        Crown(state, name, norm, d, s).to(device=like.device, dtype=like.dtype).listen(
            attacher.slot(last or self.blocks[-1].path), f"{part.name}_end")

    def _backbone_is_frozen(self, attacher: Any, part: Method) -> None:
        """What trains may stand behind the blocks (the last norm, the head), nowhere else."""
        anatomy, name = attacher.anatomy, attacher.adapter.name
        behind = tuple(f"{p}." for p in (*anatomy.head, *anatomy.final_norms.values()))
        own = [n for n, p in attacher.model.named_parameters()
               if f".burnish.{name}." in f".{n}" and p.requires_grad]
        for n in (*own, *attacher.adapter.selected):
            if not n.startswith(behind):
                raise RecipeError(f"{part.name} runs the backbone without a graph, so {n} could "
                                  "not train: drop that part of the recipe")

    def _side(self, attacher: Any, block: Block, i: int, d: int, s: int) -> nn.Module:
        m, model = self.method, attacher.model
        heads = block.heads
        if block.attn is None:
            raise RecipeError(f"lst: {block.path} has no attention; a ladder is made of "
                              "transformer blocks")
        if heads and s % heads:
            fits = [r for r in (2, 4, 8, 16, 32) if d % r == 0 and d // r % heads == 0]
            raise RecipeError(f"lst(reduction={m.reduction}): a width of {s} does not split into "
                              f"{heads} heads; {', '.join(map(str, fits)) or 'nothing'} would")
        if heads and rotary(model) and (s // heads) % 2:
            raise RecipeError(f"lst(reduction={m.reduction}): heads of width {s // heads} cannot "
                              "be rotated; rotary positions need an even width, so a smaller "
                              "reduction")
        made = shrunk(model.get_submodule(block.path), getattr(model, "config", None),
                      m.reduction, i, len(self.blocks))
        if made is not None:
            for x in made.modules():
                if hasattr(model, "_init_weights"):
                    model._init_weights(x)
            return made
        fc1 = [p for p in attacher.anatomy.places if p.path in block.mlp_in[:1]]
        if not heads or not fc1:
            raise RecipeError(f"lst: {block.path} is no transformer block a side block could be "
                              "modelled on")
        note = (f"lst: {type(model.get_submodule(block.path)).__name__} cannot be built from a "
                "config; plain pre-norm blocks stand beside it")
        attacher.notes += [note] if note not in attacher.notes else []
        return Plain(s, heads, m.narrow(fc1[0].out, "the inner width"))


def _embedding_channels(anatomy: Anatomy, d: int, s: int) -> Tensor:
    """The s channels of the residual stream with the largest L1 over the embeddings."""
    score = torch.zeros(d)
    for place in anatomy.places:
        if place.path in anatomy.embeddings and place.out == d:
            w = place.view(place.stored(anatomy.model.get_submodule(place.path)))
            score = score.to(w.device) + slicing.row_importance(w)
    return slicing.largest(score, s)


# -- cutting ------------------------------------------------------------------------------------
def prune(anatomy: Anatomy, block: Block, side: nn.Module, keep: Tensor, R: int) -> Tensor:
    """Fill a side block from its own block; returns the residual channels it ends with.

    Columns follow the set kept by what stands before a matrix. q, k and v keep the same positions
    inside each head, those with the largest row-L1 of the product of their |W|; where positions
    are rotary q and k keep every R-th frequency, which are the small head's own. The other
    matrices choose their rows by their own |W|, gate and up by the product.
    """
    cutter = _Cutter(anatomy, block, side, R)
    first, then, last = keep, keep, keep
    if cutter.has("q", "k", "v", "o"):
        rows_qk, rows_v = cutter.attention_rows()
        for role, rows in (("q", rows_qk[0]), ("k", rows_qk[1]), ("v", rows_v[0])):
            cutter.fill(role, rows, keep)
        then = last = slicing.largest(cutter.rows("o"), cutter.place("o").out // R)
        cutter.fill("o", then, rows_v[1])
        cutter.head_norms(rows_qk[0], rows_qk[1])
    inner = ("gate", "up", "down") if cutter.has("gate", "up", "down") else ("fc1", "fc2")
    if cutter.has(*inner):
        *up, down = inner
        rows = slicing.largest(cutter.rows(*up), cutter.place(down).inp // R)
        for role in up:
            cutter.fill(role, rows, then)
        last = slicing.largest(cutter.rows(down), cutter.place(down).out // R)
        cutter.fill(down, last, rows)
    cutter.norms(first, then, last)
    return last


class _Cutter:
    def __init__(self, anatomy: Anatomy, block: Block, side: nn.Module, R: int):
        self.anatomy, self.block, self.side, self.R = anatomy, block, side, R
        number = anatomy.blocks.index(block)
        mine = [p for p in anatomy.places if p.block == number and p.kind in ("linear", "conv1d")]
        self.places: dict[str, Place] = {}
        for p in mine:
            for q in (p, *anatomy.slices(p)):
                self.places.setdefault(q.role, q)

    def has(self, *roles: str) -> bool:
        return all(r in self.places for r in roles)

    def place(self, role: str) -> Place:
        return self.places[role]

    def weight(self, role: str) -> Tensor:
        p = self.places[role]
        return p.view(p.stored(self.anatomy.model.get_submodule(p.path))).detach()

    def rows(self, *roles: str) -> Tensor:
        return slicing.row_importance(*(self.weight(r) for r in roles))

    def attention_rows(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((rows of q, of k), (rows of v, columns of o))."""
        heads, kv = self.block.heads, self.block.kv_heads
        q, k, v = (self.weight(r) for r in "qkv")
        width = len(q) // heads
        n, group = width // self.R, heads // kv
        if rotary(self.anatomy.model):
            rows_k = slicing.every(width, self.R, kv)
            rows_q = slicing.every(width, self.R, heads)
            rows_v = slicing.largest_per_head(slicing.row_importance(v), kv, n)
        else:
            shared = q.view(kv, group, width, -1).abs().sum(1).flatten(0, 1)
            rows_k = rows_v = slicing.largest_per_head(
                slicing.row_importance(shared, k, v), kv, n)
            rows_q = _repeated(rows_k, kv, group, width)
        return (rows_q, rows_k), (rows_v, _repeated(rows_v, kv, group, width))

    def fill(self, role: str, rows: Tensor, columns: Tensor) -> None:
        p = self.places[role]
        small = replace(p, rows=p.rows and (p.rows[0] // self.R, p.rows[1] // self.R))
        target = self.side.get_submodule(p.path[len(self.block.path) + 1 :])
        with torch.no_grad():
            slicing.cut(small.view(small.stored(target)), self.weight(role), rows, columns)
            bias = getattr(self.anatomy.model.get_submodule(p.path), "bias", None)
            if bias is not None:
                a, b = p.rows or (0, len(bias))
                slicing.cut(target.bias[a // self.R : b // self.R], bias[a:b], rows)

    def norms(self, first: Tensor, then: Tensor, last: Tensor) -> None:
        """Norms of the residual stream: before, between or behind the two sub-layers."""
        from ..branch._sites import outer_norms, post_norm

        outer = outer_norms(self.block)
        if post_norm(self.anatomy, self.block):
            sets = dict(zip(outer, (then, last), strict=False))
        elif len(outer) == 4:
            sets = dict(zip(outer, (first, then, then, last), strict=True))
        else:
            sets = dict(zip(outer, (first, then), strict=False))
        for path, keep in sets.items():
            self._norm(path, keep)

    def head_norms(self, rows_q: Tensor, rows_k: Tensor) -> None:
        """Norms of queries and keys, one scale for all heads: positions must agree, as rotary
        ones do; else they start at their class's values."""
        heads = self.block.heads
        for path in self.block.norms:
            leaf = path.rpartition(".")[2]
            if "q_norm" in leaf or "k_norm" in leaf:
                width = len(self.weight("q")) // heads
                rows = rows_q if "q_norm" in leaf else rows_k
                if rotary(self.anatomy.model):
                    self._norm(path, rows[: width // self.R])

    def _norm(self, path: str, keep: Tensor) -> None:
        source = self.anatomy.model.get_submodule(path)
        target = self.side.get_submodule(path[len(self.block.path) + 1 :])
        for name, p in source.named_parameters(recurse=False):
            slicing.cut(getattr(target, name), p, keep)


def _repeated(rows: Tensor, kv: int, group: int, width: int) -> Tensor:
    """Positions of key heads for every query head of their groups."""
    inside = rows.view(kv, 1, -1) - torch.arange(kv, device=rows.device).view(kv, 1, 1) * width
    heads = torch.arange(kv * group, device=rows.device).view(kv, group, 1) * width
    return (inside + heads).flatten()
