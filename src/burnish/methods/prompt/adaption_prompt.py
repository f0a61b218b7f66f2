from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.attending import open_attentions
from ...blocks.state.gated_rows import GatedRows
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ._stacks import key_value_linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block


@dataclass(frozen=True, kw_only=True)
class AdaptionPrompt(Method):
    """LLaMA-Adapter: attentions read learnt rows beside their own tokens, behind a gate from zero.

    ``y = Attn(q, K, V) + g softmax(t q P_k^T) P_v``, t the scale of the attention, before its last
    projection: P (length, d) enters the layer's own projections, ``P_k = W_k P``, ``P_v = W_v P``,
    so d is what these read; keys of the rows have no rotary position, and no mask hides them. The
    softmax of the rows is their own: unlike in `prefix` they take nothing from real tokens.
    It stands in the last `layers` blocks of every stack.

    One gate g for an attention, or (``per_head=True``) one for each head; ``squash=True`` takes its
    tanh. The published code has both, PEFT neither.

    Start: g = 0: the pre-trained function exactly; P normal. Trains length d + 1 (or + heads) per
    attention: 1.2M on LLaMA-7B with the paper's 10 rows in the last 30 of 32 blocks. Kept for
    backward: what frozen blocks keep, and the rows' answer, d numbers per token. Not mergeable.

    Works wherever attention calls ``F.scaled_dot_product_attention`` on outputs of linears of its
    own; ``nn.MultiheadAttention`` and qkv interleaved head by head are refused.
    """

    paper: ClassVar[str] = ("LLaMA-Adapter: Efficient Fine-tuning of Language Models with "
                            "Zero-init Attention (2023), arXiv:2303.16199")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"open attention"})
    merges: ClassVar[bool] = False

    length: int = setting(10, "rows per attention", alias=("adapter_len",))
    layers: int | None = setting(None, "how many of the last blocks of a stack; None: all",
                                 alias=("adapter_layers",), other=(1,))
    per_head: bool = setting(False, "a gate for each head")
    squash: bool = setting(False, "gates act by their tanh")

    def __post_init__(self) -> None:
        if self.length < 1:
            raise RecipeError(f"adaption_prompt(length={self.length}): expected at least one row")

    def repeats(self) -> int | None:
        return None if self.layers else 1

    def forbids(self) -> dict[str, str]:
        return {"how attention is computed": "adaption_prompt adds to what the exact attention "
                                             "answers"}

    def prompt(self, anatomy: Anatomy) -> Asides:
        if self.targets is not None:
            raise RecipeError("adaption_prompt takes no targets: it stands in the last attentions; "
                              "say how many with layers")
        paths = open_attentions(anatomy, self.name)
        found = []
        for stack, blocks in anatomy.stacks().items():
            mine = [b for b in blocks if b.attn in paths]
            if mine and self.layers is not None and not 1 <= self.layers <= len(mine):
                raise RecipeError(f"adaption_prompt(layers={self.layers}): {stack or 'the model'} "
                                  f"has {len(mine)} blocks with attention")
            found += mine[-(self.layers or 0):]
        return Asides(self, found)

    def count(self, attentions: int, d: int, heads: int) -> int:
        """Trainable parameters of so many attentions over states of width d."""
        return attentions * (self.length * d + (heads if self.per_head else 1))


@dataclass(frozen=True)
class Asides:
    """Rows beside the keys and values of the attentions of these blocks."""

    method: AdaptionPrompt
    blocks: list[Block]

    def install(self, attacher: Any, part: Method) -> None:
        m, anatomy = self.method, attacher.anatomy
        for block in self.blocks:
            attn = block.attn or ""
            if m.per_head and not block.heads:
                raise RecipeError(f"{m.name}(per_head=True): how many heads {attn} has cannot "
                                  "be told")
            places = key_value_linears(anatomy, anatomy.blocks.index(block), attn, m.name)
            sources = [(p.path.removeprefix(f"{attn}."), p.rows) for p in places]
            made = GatedRows(attacher.state, attacher.adapter.name, m.length, places[0].inp,
                             block.heads if m.per_head else 1, sources, m.squash)
            made.to(attacher.device(attn)).listen(attacher.slot(attn), part.name)
