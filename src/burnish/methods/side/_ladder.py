"""Putting the ladders of lst beside the stacks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...blocks.state.sideblocks import TABLE, Plain, shrunk
from ...blocks.state.taps import Crown, Foot, Rung, Still
from ...blocks.weight import slicing
from ...core.errors import RecipeError
from ...core.families import rotary
from ...core.method import Method
from ._cutting import Scores, embedding_channels, prune

if TYPE_CHECKING:
    from ...core.anatomy import Block
    from .lst import Lst


@dataclass(frozen=True)
class Ladder:
    """One rung beside every block of a stack (a bare one where the ladder skips it).

    stacks: (its blocks, those with a side block) of the one stack, or of encoder and decoder.
    """

    method: Lst
    stacks: tuple[tuple[list[Block], frozenset[int]], ...]

    def install(self, attacher: Any, part: Method) -> None:
        self._backbone_is_frozen(attacher, part)
        d = self._width(attacher)
        s = self.method.narrow(d, "the width")
        self._still(attacher, part)
        scores = Scores(attacher.anatomy)
        if self.method.init == "fisher":
            scores.read(attacher, part, [b for blocks, kept in self.stacks
                                         for i, b in enumerate(blocks) if i in kept])
        keep = None
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
        for i, block in enumerate(blocks):
            side = None
            if i in kept:
                side = self._side(attacher, blocks, i, s, table=i == min(kept))
                if m.init != "random" and not isinstance(side, Plain):
                    keep = prune(scores, block, side, keep, encoded, m.reduction, blocks[0])
            rung = Rung(state, name, side, d, s, enter=i == 0)
            rung.to(device=like.device, dtype=like.dtype).listen(attacher.slot(block.path),
                                                                 part.name)
        end = anatomy.final_norms.get(blocks[0].stack)
        norm = slicing.cut_norm(model.get_submodule(end), keep) if end else nn.LayerNorm(s)
        made = Crown(state, name, norm, d, s) if last else Foot(state, name, norm)
        made.to(device=like.device, dtype=like.dtype).listen(
            attacher.slot(end or blocks[-1].path), f"{part.name}_end")
        return keep

    # -- what it stands beside -----------------------------------------------------------------
    def _width(self, attacher: Any) -> int:
        blocks = [b for stack, _ in self.stacks for b in stack]
        d = blocks[0].hidden_size or attacher.anatomy.hidden_size
        if d is None or len({b.hidden_size for b in blocks}) > 1:
            raise RecipeError("lst: the blocks have different widths; a ladder has one")
        return d

    def _still(self, attacher: Any, part: Method) -> None:
        """The backbone drops nothing, run as a whole or (encoder, decoder) in parts."""
        model, head, name = attacher.model, attacher.anatomy.head, attacher.adapter.name
        stems = {b[0].stack.split(".")[0] for b, _ in self.stacks if "." in b[0].stack}
        inside = [x for p, x in model.named_modules() if p and "burnish" not in p.split(".")
                  and not any(p == h or p.startswith(f"{h}.") for h in head)
                  and (not stems or p.split(".")[0] in stems)]
        Still(attacher.state, name, inside).listen(attacher.slot(""), part.name)
        for blocks, _ in self.stacks if len(self.stacks) > 1 else ():
            top = blocks[0].stack.rpartition(".")[0]
            mine = [x for p, x in model.named_modules() if f"{p}.".startswith(f"{top}.")
                    and "burnish" not in p.split(".")]
            Still(attacher.state, name, mine, part=True).listen(attacher.slot(top), part.name)

    def _backbone_is_frozen(self, attacher: Any, part: Method) -> None:
        """What trains may stand behind the blocks (the last norm, the head), nowhere else."""
        anatomy, name = attacher.anatomy, attacher.adapter.name
        end = anatomy.final_norms.get(self.stacks[-1][0][0].stack)
        behind = tuple(f"{p}." for p in (*anatomy.head, *([end] if end else ())))
        own = [n for n, p in attacher.model.named_parameters()
               if f".burnish.{name}." in f".{n}" and p.requires_grad]
        for n in (*own, *attacher.adapter.selected):
            if not n.startswith(behind):
                raise RecipeError(f"{part.name} runs the backbone without a graph, so {n} could "
                                  "not train: drop that part of the recipe")

    # -- its blocks ----------------------------------------------------------------------------
    def _side(self, attacher: Any, blocks: list[Block], i: int, s: int, table: bool) -> nn.Module:
        m, model, block = self.method, attacher.model, blocks[i]
        self._heads_fit(model, block, s)
        shares = any(getattr(x, TABLE, False)
                     for x in model.get_submodule(blocks[0].path).modules())
        made = shrunk(model.get_submodule(block.path), getattr(model, "config", None),
                      m.reduction, i, len(blocks), table and shares)
        if made is not None:
            for x in made.modules():
                if hasattr(model, "_init_weights"):
                    model._init_weights(x)
            return made
        fc1 = [p for p in attacher.anatomy.places if p.path in block.mlp_in[:1]]
        if not block.heads or not fc1 or block.cross:
            raise RecipeError(f"lst: {block.path} is no transformer block a side block could be "
                              "modelled on")
        note = (f"lst: {type(model.get_submodule(block.path)).__name__} cannot be built from a "
                "config; plain pre-norm blocks stand beside it")
        attacher.notes += [note] if note not in attacher.notes else []
        return Plain(s, block.heads, m.narrow(fc1[0].out, "the inner width"))

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
