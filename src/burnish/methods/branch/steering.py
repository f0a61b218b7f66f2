from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.state.gates import Shift
from ...blocks.state.steered import Batch, contrast, purified, states
from ...core.errors import ConfigError, RecipeError
from ...core.families import BEHIND
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import outer_norms, post_norm, width

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block


@dataclass(frozen=True, kw_only=True)
class Steering(Method):
    """Steering: one vector is added to the states behind one block.

    ``h_l <- h_l + alpha v`` at every token, v (hidden,). From pairs of responses that have much and
    little of a trait, v is a difference of means over the tokens of the responses, a token of a
    long response weighing less (unconfirmed)::

        v = mean h_l(high) - mean h_l(low)
        v <- v - (v . c) c        c of length one: another trait's direction ("purification")

        part = tuned.recipe[0]
        part.lifecycle(tuned, pairs, against=[c])       # pairs of batches with `labels`

    `burnish steer` does so from a table of prompts with two answers, tries strengths, and writes
    the adapter. Without pairs v trains as any other part does (what is learnt is alpha v).

    Start: v = 0: the pre-trained function exactly; alpha = 0 is that too. Trains one number per
    channel of one block, 2,304 of Gemma-2-2B. Kept for backward: nothing. Merges exactly, at all
    positions, into the bias of the last matrix of the block's MLP, which gets one where it has
    none; where a norm stands behind it (BERT), into that norm's shift (an RMSNorm has none: a merge
    is refused).
    Departure: prompts are steered too, as a bias cannot tell them from what is generated.

    When to use: a tone or a manner, no data to train on beyond some tens of pairs, many traits to
    be switched. When not: knowledge, formats, or alignment that must hold: published, prompts with
    examples keep more ability at the same alignment and LoRA aligns more.
    """

    paper: ClassVar[str] = "Personality as a Probe for LLM Evaluation (2025)"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"last linears"})

    layer: int | None = setting(None, "block, from 0 (-1: the last); None: the middle",
                                other=(0, -1))
    alpha: float = setting(1.0, "what the vector is multiplied by")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        if not any(b.mlp_out for b in anatomy.blocks):
            return
        path, channels = self._end(anatomy, self.block(anatomy))
        yield Branch(path, Shift(((0, channels),), self.alpha), compose="replace")

    def block(self, anatomy: Anatomy) -> Block:
        """The block whose states are changed; of several stacks the last one's."""
        ends = [b for b in anatomy.blocks if b.mlp_out]
        blocks = [b for b in ends if b.stack == ends[-1].stack]
        at = len(blocks) // 2 if self.layer is None else self.layer
        if not -len(blocks) <= at < len(blocks):
            raise RecipeError(f"steering(layer={at}): this model has blocks 0 to "
                              f"{len(blocks) - 1}")
        return blocks[at]

    def repeats(self) -> int | None:
        return None

    @staticmethod
    def _end(anatomy: Anatomy, block: Block) -> tuple[str, int]:
        """(the last module whose result is part of what the block returns, its channels)."""
        norm = post_norm(anatomy, block)
        if norm is None:
            last = outer_norms(block)[-1:]
            norm = next((n for n in last if BEHIND.search(n.rpartition(".")[2])
                         and "attn" not in n.rpartition(".")[2]), None)
        if norm is not None:
            module = anatomy.model.get_submodule(norm)
            return norm, next(module.parameters()).numel()
        assert block.mlp_out is not None
        return block.mlp_out, width(anatomy, block.mlp_out, block)

    @staticmethod
    def count(hidden: int) -> int:
        """Trainable parameters, of a block of this width."""
        return hidden

    # -- from pairs ----------------------------------------------------------------------------
    @torch.no_grad()
    def lifecycle(self, tuned: Any, pairs: Iterable[tuple[Batch, Batch]],
                  against: Sequence[Tensor] = ()) -> Tensor:
        """Sets v from pairs of batches (high, low), and gives it. ConfigError where the block's
        states do not become ``h + alpha v`` by it."""
        pairs = list(pairs)
        block, shift = self.block(tuned.anatomy), self._shift(tuned)
        with tuned.disabled():
            v = contrast(tuned.model, block.path, pairs)
            before = states(tuned.model, block.path, pairs[0][0]).to(v)
        v = purified(v, [c.to(v) for c in against])
        shift.copy_(v.to(shift))
        after, add = states(tuned.model, block.path, pairs[0][0]), self.alpha * shift.to(v)
        rounding = torch.finfo(after.dtype).eps ** 0.5       # room for other orders of sums
        if (after.to(v) - before - add).norm() > rounding * after.norm():
            shift.zero_()
            raise ConfigError(f"steering: {block.path} does more with what its MLP gives than add "
                              "it, so its states cannot be moved by one vector; name another layer")
        return v

    def _shift(self, tuned: Any) -> nn.Parameter:
        path = self._end(tuned.anatomy, self.block(tuned.anatomy))[0]
        found = [p for n, p in tuned.named_parameters()
                 if n.startswith(f"{path}.burnish.") and n.endswith(".steering.shift")]
        if len(found) != 1:
            raise ConfigError(f"steering: {len(found)} vectors stand behind {path}, and one is "
                              "expected")
        return found[0]
