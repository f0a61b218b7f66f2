"""Putting the ladders of lst beside the stacks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...blocks.state.sideblocks import Plain, shrunk
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
        """The backbone drops nothing, run as a whole or in parts (without the head; an encoder)."""
        name, stacks = attacher.adapter.name, [b[0].stack.split(".") for b, _ in self.stacks]
        above = {p for names in stacks for p in _prefixes(names[:-1])}
        stems = {names[0] for names in stacks if len(names) > 1}
        heads = [next(p for p in _prefixes(h.split(".")) if p not in above)
                 for h in attacher.anatomy.head]         # with what stands beside it: its dropout
        inside = {p: x for p, x in attacher.model.named_modules()
                  if p and "burnish" not in p.split(".")
                  and not any(f"{p}.".startswith(f"{h}.") for h in heads)
                  and (not stems or p.split(".")[0] in stems)}
        Still(attacher.state, name, list(inside.values())).listen(attacher.slot(""), part.name)
        for top in sorted(above):
            mine = [x for p, x in inside.items() if f"{p}.".startswith(f"{top}.")]
            Still(attacher.state, name, mine, part=True).listen(attacher.slot(top), part.name)

    def _backbone_is_frozen(self, attacher: Any, part: Method) -> None:
        """What trains may stand behind the blocks (the last norm, the head), nowhere else."""
        anatomy, name = attacher.anatomy, attacher.adapter.name
        end = anatomy.final_norms.get(self.stacks[-1][0][0].stack)
        behind = tuple(f"{p}." for p in (*anatomy.head, end) if p)
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


def _prefixes(names: list[str]) -> list[str]:
    """The paths of a module and of those above it, the outermost first."""
    return [".".join(names[: n + 1]) for n in range(len(names))]
