"""Putting the ladders of lst beside the stacks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...blocks.state.sideblocks import Plain, shrunk
from ...blocks.state.taps import Crown, Foot, Rung
from ...blocks.weight import slicing
from ...core.errors import RecipeError
from ...core.families import rotary
from ...core.method import Method
from ._beside import frozen, still, width
from ._cutting import Scores, embedding_channels, prune

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from .lst import Lst


@dataclass(frozen=True)
class Ladder:
    """One rung beside every block of a stack (a bare one where the ladder skips it).

    stacks: (its blocks, those with a side block) of the one stack, or of encoder and decoder.
    """

    method: Lst
    stacks: tuple[tuple[list[Block], frozenset[int]], ...]

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, stacks = attacher.anatomy, [blocks for blocks, _ in self.stacks]
        end = anatomy.final_norms.get(stacks[-1][0].stack)
        frozen(attacher, part, tuple(f"{p}." for p in (*anatomy.head, end) if p))
        d = width(anatomy, part, stacks)
        s = self.method.narrow(d, "the width")
        still(attacher, part, stacks)
        scores = Scores(attacher.anatomy)
        if self.method.init == "fisher":
            scores.read(attacher, part, [b for blocks, kept in self.stacks
                                         for i, b in enumerate(blocks) if i in kept])
        keep = None
        if self.method.cache is not None and len(self.stacks) > 1:
            raise RecipeError("lst(cache=...) keeps the states of one stack of blocks; beside an "
                              "encoder and its decoder leave cache out")
        for n, (blocks, kept) in enumerate(self.stacks):
            last = n + 1 == len(self.stacks)
            keep = self._stack(attacher, part, blocks, kept, scores, (d, s), keep, last)

    def _stack(self, attacher: Any, part: Method, blocks: list[Block], kept: Iterable[int],
               scores: Scores, widths: tuple[int, int], encoded: Tensor | None, last: bool
               ) -> Tensor:
        """The ladder of one stack; the channels of the residual stream it ends with.

        encoded: those of the encoder's, which cross-attention reads."""
        m, model, anatomy = self.method, attacher.model, attacher.anatomy
        state, name = attacher.state, attacher.adapter.name
        d, s = widths
        like = next(p for p in model.get_submodule(blocks[0].path).parameters()
                    if p.is_floating_point())
        keep = embedding_channels(scores, d, s)
        cache = m.keeping(attacher, blocks)
        for i, block in enumerate(blocks):
            side = None
            if i in kept:
                side = self._side(attacher, blocks, i, s, table=i == min(kept))
                if m.init != "random" and not isinstance(side, Plain):
                    keep = prune(scores, block, side, keep, encoded, m.reduction, blocks[0])
            rung = Rung(state, name, side, d, s, enter=i == 0, form=m.down, channels=m.channels,
                        bottleneck=m.bottleneck).kept(cache, i)
            rung.to(device=like.device, dtype=like.dtype).listen(attacher.slot(block.path),
                                                                 part.name)
        end = anatomy.final_norms.get(blocks[0].stack)
        norm = slicing.cut_norm(model.get_submodule(end), keep) if end else nn.LayerNorm(s)
        made = Crown(state, name, norm, d, s, m.channels) if last else Foot(state, name, norm)
        made.to(device=like.device, dtype=like.dtype).listen(
            attacher.slot(end or blocks[-1].path), f"{part.name}_end")
        return keep

    # -- its blocks ----------------------------------------------------------------------------
    def _side(self, attacher: Any, blocks: list[Block], i: int, s: int, table: bool) -> nn.Module:
        m, model, block = self.method, attacher.model, blocks[i]
        self._heads_fit(model, block, s)
        made = shrunk(model.get_submodule(block.path), getattr(model, "config", None),
                      m.reduction, i, len(blocks), table)
        if made is not None:
            for x in made.modules():
                if hasattr(model, "_init_weights"):
                    model._init_weights(x)
            return made
        inner = next((p.inp for p in attacher.anatomy.places if p.path == block.mlp_out), None)
        if not block.heads or inner is None or block.cross:
            raise RecipeError(f"lst: {block.path} is no transformer block a side block could be "
                              "modelled on")
        note = (f"lst: {type(model.get_submodule(block.path)).__name__} cannot be built from a "
                "config; plain pre-norm blocks stand beside it")
        attacher.notes += [note] if note not in attacher.notes else []
        return Plain(s, block.heads, m.narrow(inner, "the inner width"))

    def _heads_fit(self, model: nn.Module, block: Block, s: int) -> None:
        heads, R = block.heads, self.method.reduction
        if block.attn is None:
            raise RecipeError(f"lst: {block.path} has no attention; a ladder is made of "
                              "transformer blocks")
        if heads and s % heads:
            fits = [r for r in (2, 4, 8, 16, 32) if s * R % r == 0 and s * R // r % heads == 0]
            raise RecipeError(f"lst(reduction={R}): a width of {s} does not split into "
                              f"{heads} heads; {', '.join(map(str, fits)) or 'nothing'} would")
        if heads and rotary(model) and (s // heads) % 2:
            raise RecipeError(f"lst(reduction={R}): heads of width {s // heads} cannot "
                              "be rotated; rotary positions need an even width, so a smaller "
                              "reduction")


def ladder(method: Lst, anatomy: Anatomy) -> Ladder:
    """The one of a recipe, or an error that says why this model has none."""
    if method.targets is not None:
        raise RecipeError("lst takes no targets: it reads whole blocks; choose them with "
                          "lst(layers=[...])")
    stacks = anatomy.stacks()
    if not stacks:
        raise RecipeError("lst: no repeated blocks were found in this model")
    pair = anatomy.encoder_decoder()
    if pair is None and len(stacks) > 1:
        raise RecipeError(f"lst: this model has several stacks of blocks ({', '.join(stacks)}); a "
                          "ladder stands beside one, or beside an encoder and its decoder")
    if pair is None and any(b.cross for b in anatomy.blocks):
        raise RecipeError(f"lst: the blocks of {next(iter(stacks))} attend to an encoder that is "
                          "no part of this model, so the side blocks could not")
    return Ladder(method, tuple((stacks[n], kept(method, stacks[n])) for n in pair or stacks))


def kept(method: Lst, blocks: list[Block]) -> frozenset[int]:
    """Which blocks of a stack have a side block."""
    asked = range(len(blocks)) if method.layers is None else method.layers
    wrong = [i for i in asked if not -len(blocks) <= i < len(blocks)]
    if wrong:
        raise RecipeError(f"lst(layers=...): there is no block {wrong[0]}; this model has "
                          f"{len(blocks)}, counted from 0")
    return frozenset(i % len(blocks) for i in asked)
