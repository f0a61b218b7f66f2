"""Cutting the side blocks of lst out of the blocks they stand beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...blocks.weight import slicing
from ...core.errors import RecipeError
from ...core.families import rotary
from ...core.method import Method
from ..branch._sites import outer_norms, post_norm

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.site import Place

#: matrices that keep the same rows, so that their importances are multiplied
TOGETHER = frozenset({"q", "k", "v", "gate", "up"})


class Scores:
    """How important every entry of a matrix is: |W|, or squared gradients once they were read."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self.seen: dict[str, Tensor] = {}        # name of a place -> (out, in), or (out, 1) sums

    def read(self, attacher: Any, part: Method, blocks: Sequence[Block]) -> None:
        """Squared gradients of what side blocks are cut from, and of the embeddings. Nothing where
        no value is wanted (a load, a simulation)."""
        numbers = {self.anatomy.blocks.index(b) for b in blocks}
        places = [p for p in self.anatomy.places
                  if p.block in numbers and p.kind in ("linear", "conv1d")
                  or p.block is None and p.path in self.anatomy.embeddings]
        held = next((p for p in places if not isinstance(p.stored(
            self.anatomy.model.get_submodule(p.path)), nn.Parameter)), None)
        if held is not None:
            raise RecipeError(f"{part.name}(init='fisher') reads gradients of whole weights, and a "
                              f"storage of this recipe holds {held.name} in another form; drop "
                              "that, or take init='prune'")
        for place, statistic, _ in attacher.informed(part, places):
            if statistic is not None:
                parts = (place, *self.anatomy.slices(place))
                joint = TOGETHER & {q.role.removeprefix("cross_") for q in parts}
                squares = statistic.value
                self.seen[place.name] = squares if joint else squares.sum(1, keepdim=True)

    def weight(self, place: Place) -> Tensor:
        return place.view(place.stored(self.anatomy.model.get_submodule(place.path))).detach()

    def of(self, place: Place) -> Tensor:
        """(out, in), or anything with the same row sums of magnitudes."""
        whole = self.seen.get(replace(place, rows=None).name)
        if whole is None:
            return self.weight(place)
        return whole[place.rows[0] : place.rows[1]] if place.rows else whole


def embedding_channels(scores: Scores, d: int, s: int) -> Tensor:
    """The s channels of the residual stream with the largest L1 over the embeddings."""
    total = torch.zeros(d)
    for place in scores.anatomy.places:
        if place.path in scores.anatomy.embeddings and place.out == d:
            rows = slicing.row_importance(scores.of(place))
            total = total.to(rows.device) + rows
    return slicing.largest(total, s)


def prune(scores: Scores, block: Block, side: nn.Module, keep: Tensor, encoded: Tensor | None,
          R: int, first: Block) -> Tensor:
    """Fill a side block from its own block; returns the residual channels it ends with.

    Columns follow the set kept by what stands before a matrix (`keep`; `encoded` before the keys
    and values of cross-attention). q, k and v keep the same positions inside each head, those with
    the largest row-L1 of the product of their importances; where positions are rotary q and k keep
    every R-th frequency, which are the small head's own. The other matrices choose their rows by
    their own importance, gate and up by the product. A table of relative positions has a column a
    head and is taken whole, from the first block of the stack.
    """
    cutter = Cutter(scores, block, side, R)
    sets = [keep, then := cutter.attention("", keep, keep)]
    if block.cross is not None:
        sets.append(then := cutter.attention("cross_", then, encoded))
    sets.append(then := cutter.mlp(then))
    cutter.norms(sets)
    cutter.tables(first)
    return then


class Cutter:
    """One side block, and the block it is cut out of."""

    def __init__(self, scores: Scores, block: Block, side: nn.Module, R: int):
        self.scores, self.block, self.side, self.R = scores, block, side, R
        self.anatomy = scores.anatomy
        number = self.anatomy.blocks.index(block)
        self.places: dict[str, Place] = {}
        for p in self.anatomy.places:
            if p.block == number and p.kind in ("linear", "conv1d"):
                for q in (p, *self.anatomy.slices(p)):
                    self.places.setdefault(q.role, q)

    # -- sub-layers: columns of their inputs -> channels of the residual stream behind them -----
    def attention(self, cross: str, keep: Tensor, read: Tensor | None) -> Tensor:
        """read: channels of what keys and values are made of."""
        q, k, v, o = (f"{cross}{r}" for r in "qkvo")
        if not self._has(q, k, v, o):
            return keep
        (rows_q, rows_k), (rows_v, columns_o) = self._heads(q, k, v)
        for role, rows, columns in ((q, rows_q, keep), (k, rows_k, read), (v, rows_v, read)):
            self.fill(role, rows, columns)
        then = slicing.largest(self._rows(o), self.places[o].out // self.R)
        self.fill(o, then, columns_o)
        if not cross:
            self._head_norms(rows_q, rows_k)
        return then

    def mlp(self, keep: Tensor) -> Tensor:
        *up, down = ("gate", "up", "down") if self._has("gate", "up", "down") else ("fc1", "fc2")
        if not self._has(*up, down):
            return keep
        inner = slicing.largest(self._rows(*up), self.places[down].inp // self.R)
        for role in up:
            self.fill(role, inner, keep)
        then = slicing.largest(self._rows(down), self.places[down].out // self.R)
        self.fill(down, then, inner)
        return then

    def _has(self, *roles: str) -> bool:
        return all(r in self.places for r in roles)

    def _score(self, role: str) -> Tensor:
        return self.scores.of(self.places[role])

    def _rows(self, *roles: str) -> Tensor:
        return slicing.row_importance(*(self._score(r) for r in roles))

    def _heads(self, q: str, k: str, v: str
               ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((rows of q, of k), (rows of v, columns of o))."""
        heads = self.block.heads
        width = self.places[q].out // heads
        kv = self.places[k].out // width
        n, group = width // self.R, heads // kv
        if rotary(self.anatomy.model):
            rows_k = slicing.every(width, self.R, kv)
            rows_q = slicing.every(width, self.R, heads)
            rows_v = slicing.largest_per_head(self._rows(v), kv, n)
        else:
            Q, K, V = (self._score(r).abs().float() for r in (q, k, v))
            joint = torch.einsum("kgwi,kwi,kwi->kw", Q.unflatten(0, (kv, group, width)),
                                 K.unflatten(0, (kv, width)), V.unflatten(0, (kv, width)))
            rows_k = rows_v = slicing.largest_per_head(joint, kv, n)
            rows_q = _repeated(rows_k, kv, group, width)
        return (rows_q, rows_k), (rows_v, _repeated(rows_v, kv, group, width))

    # -- tensors -------------------------------------------------------------------------------
    def fill(self, role: str, rows: Tensor, columns: Tensor) -> None:
        p = self.places[role]
        small = replace(p, rows=p.rows and (p.rows[0] // self.R, p.rows[1] // self.R))
        target = self.side.get_submodule(self._inside(p.path))
        with torch.no_grad():
            slicing.cut(small.view(small.stored(target)), self.scores.weight(p), rows, columns)
            bias = getattr(self.anatomy.model.get_submodule(p.path), "bias", None)
            if bias is not None:
                a, b = p.rows or (0, len(bias))
                slicing.cut(target.bias[a // self.R : b // self.R], bias[a:b], rows)

    def norms(self, sets: Sequence[Tensor]) -> None:
        """Norms of the residual stream: before, behind, or around every sub-layer. sets: the
        channels before the first and behind each."""
        outer, layers = outer_norms(self.block), len(sets) - 1
        ends = len(outer) == layers and any("post_feedforward" in n for n in outer)     # OLMo2
        if ends or post_norm(self.anatomy, self.block):
            found = sets[1:]
        elif len(outer) == 2 * layers:
            found = [s for pair in zip(sets, sets[1:], strict=False) for s in pair]
        else:
            found = sets[:-1]
        for path, keep in zip(outer, found, strict=False):
            self._norm(path, keep)

    def _head_norms(self, rows_q: Tensor, rows_k: Tensor) -> None:
        """Norms of queries and keys. A scale for every row (OLMo2) goes with it; those of one head
        that all share (Qwen3) go with its rows where heads agree on them, as rotary ones do, and
        else start as their class does."""
        for path in self.block.norms:
            leaf = path.rpartition(".")[2]
            for name, rows in (("q_norm", rows_q), ("k_norm", rows_k)):
                if name in leaf:
                    n = len(self.anatomy.model.get_submodule(path).weight) // self.R
                    if n == len(rows) or rotary(self.anatomy.model):
                        self._norm(path, rows[:n])

    def _norm(self, path: str, keep: Tensor) -> None:
        source = self.anatomy.model.get_submodule(path)
        target = self.side.get_submodule(self._inside(path))
        for name, p in source.named_parameters(recurse=False):
            slicing.cut(getattr(target, name), p, keep)

    @torch.no_grad()
    def tables(self, first: Block) -> None:
        """Of relative positions: the block's own, or the one its stack shares."""
        own, shared = (self.anatomy.model.get_submodule(b.path) for b in (self.block, first))
        for path, table in self.side.named_modules():
            if path.rpartition(".")[2] == "relative_attention_bias":
                known = dict(own.named_modules())
                table.weight.copy_((known.get(path) or shared.get_submodule(path)).weight)

    def _inside(self, path: str) -> str:
        return path[len(self.block.path) + 1 :]


def _repeated(rows: Tensor, kv: int, group: int, width: int) -> Tensor:
    """Positions of key heads for every query head of their groups."""
    inside = rows.view(kv, 1, -1) - torch.arange(kv, device=rows.device).view(kv, 1, 1) * width
    heads = torch.arange(kv * group, device=rows.device).view(kv, group, 1) * width
    return (inside + heads).flatten()
