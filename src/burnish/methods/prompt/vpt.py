from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ...blocks.state.prompts import Tokens
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ..delta.lowrank.lora import check_dropout
from ._stacks import above, states_as_they_were

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

#: names of a class token
CLASS = ("cls_token", "class_token", "class_embedding")
_MORE = ("distillation_token", "dist_token", "register_tokens", "reg_token", "storage_tokens")


@dataclass(frozen=True, kw_only=True)
class Vpt(Method):
    """Visual prompt tuning: trainable tokens among the patches of a vision transformer.

    Shallow: ``[cls; P; E]`` enters the first block and the tokens are carried on. Deep: every
    block i gets fresh ones, ``[cls_i; _; E_i] = L_i([cls; P_i; E])``, what came out at their place
    is dropped. P (length, d), without positions; behind the last block they are taken out, so
    norm, pooling and head see the tokens they know.

    Start: U(-v, v), v = sqrt(6 / (3 patch^2 + d)) with 3 patch^2 the inputs of the patch embedding
    (d where there is none). Never the pre-trained function, except deep with length 0.
    Trains length * d, deep per block. Kept for backward: what frozen blocks keep, for `length` more
    tokens. Not mergeable. Dropout acts on the tokens.

    For stacks of one width whose blocks take (batch, tokens, width) without a mask; Swin and
    convolutional networks are refused.
    """

    paper: ClassVar[str] = "Visual Prompt Tuning (2022), arXiv:2203.12119"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"states"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    length: int = setting(50, "tokens per block", alias=("num_tokens",))
    deep: bool = setting(False, "fresh tokens in every block")
    dropout: float = setting(0.1, "dropout on the tokens")
    after: int | None = setting(None, "tokens before them; None counts class, distillation and "
                                      "register tokens", other=(0,))

    def __post_init__(self) -> None:
        check_dropout("vpt", self.dropout)

    def claims(self) -> tuple[str, ...]:
        return ("where prompts stand among patches",) if self.after else ()

    def forbids(self) -> dict[str, str]:
        return {"which tokens go on": "vpt finds its tokens by their places"}

    def prompt(self, anatomy: Anatomy) -> Among:
        if self.targets is not None:
            raise RecipeError("vpt takes no targets: it stands before the whole stack of blocks")
        stacks = [s for s in anatomy.stacks().values() if s[0].attn is not None]
        vision = [s for s in stacks if patch_inputs(anatomy, s[0].stack)] or stacks
        if not vision:
            raise RecipeError("vpt: this model has no transformer blocks to put tokens before")
        blocks = vision[0]
        if above(anatomy, blocks[0].stack, "input_ids") is not None and vision is stacks:
            raise RecipeError(f"vpt: the blocks of {blocks[0].stack} read text, whose masks and "
                              "positions would not fit; use prompt_tuning or prefix")
        if len({b.hidden_size for b in blocks}) > 1:
            raise RecipeError(f"vpt: the blocks of {blocks[0].stack} have different widths, and "
                              "their tokens are windows of a map; vpt serves plain vision "
                              "transformers")
        return Among(self, blocks)

    def count(self, d: int, blocks: int) -> int:
        """Trainable parameters at width d."""
        return self.length * d * (blocks if self.deep else 1)


@dataclass(frozen=True)
class Among:
    """Tokens among those of one stack of blocks."""

    method: Vpt
    blocks: list

    def install(self, attacher: Any, part: Method) -> None:
        m, anatomy, last = self.method, attacher.anatomy, len(self.blocks) - 1
        stack = self.blocks[0].stack
        d = self.blocks[0].hidden_size
        v = (6 / ((patch_inputs(anatomy, stack) or d) + d)) ** 0.5
        after = special_tokens(anatomy.model, stack) if m.after is None else m.after
        for i, block in enumerate(self.blocks):
            fresh = m.deep or i == 0
            rows = torch.empty(m.length, d).uniform_(-v, v).to(attacher.device(block.path)) \
                if fresh else None
            Tokens(attacher.state, attacher.adapter.name, m.length, rows, after=after,
                   enter=i == 0, leave=i == last, dropout=m.dropout
                   ).listen(attacher.slot(block.path), part.name)
        states_as_they_were(attacher, part, stack, m.length, after)


def patch_inputs(anatomy: Anatomy, stack: str) -> int | None:
    """Inputs of the patch embedding that feeds a stack: 3 patch^2 for pictures."""
    top = stack.split(".")[0]
    patches = [p for p in anatomy.places if p.role == "patch" and p.block is None]
    mine = [p for p in patches if p.path.split(".")[0] == top] or (
        patches if len(anatomy.stacks()) == 1 else [])
    return mine[0].inp if mine else None


def special_tokens(model: nn.Module, stack: str) -> int:
    """Tokens before the patches: class, distillation and registers, by their parameters."""
    if isinstance(count := getattr(model, "num_prefix_tokens", None), int):
        return count
    top = stack.split(".")[0]
    held = {n: p for n, p in model.named_parameters()
            if "." not in n or n.split(".")[0] == top or len(stack.split(".")) == 1}
    n = 0
    for name, p in held.items():
        leaf = name.rpartition(".")[2]
        n += leaf in CLASS
        n += (p.shape[-2] if p.dim() > 1 else 1) if leaf in _MORE else 0
    return n
