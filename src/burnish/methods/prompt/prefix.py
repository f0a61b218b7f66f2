from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.prompts import KeysValues, Trunk
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block

_OTHER = ("eager", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """Prefix tuning: trainable rows before the keys and the values of every attention.

    ``K' = [P_k; K]``, ``V' = [P_v; V]``, P_k and P_v (length, H h) per attention with H heads of
    keys of width h (fewer than those of queries under grouped-query attention). Equal to a gated
    sum: ``(1 - l) Attn(K, V) + l softmax(q P_k^T) P_v``, l the share of attention the prefix gets.

    The rows join as attention sees them, behind rotary positions; positions of real tokens do not
    move, a key-value cache holds none of the rows, a causal mask hides none of them.

    With ``hidden > 0`` the rows are ``up_l tanh(W P' + b)``, P' (length, d) and W (hidden, d)
    shared by all layers; a finished file (``tuned.save``) holds the rows alone, as of ``hidden=0``,
    a checkpoint of a run all of it. Start: rows N(0, 0.02^2),
    or P' normal; never the pre-trained function, since the prefix takes a share.
    Trains 2 length H h per attention; with the MLP length d + (d + 1) hidden once and
    2 (hidden + 1) H h per attention. Kept for backward: what frozen blocks keep and the extra
    keys and values; no extra queries. Not mergeable.

    Works wherever attention calls ``F.scaled_dot_product_attention``, and on
    ``nn.MultiheadAttention``; eager attention is refused.
    """

    paper: ClassVar[str] = ("Prefix-Tuning (2021), arXiv:2101.00190; P-Tuning v2 (2022), "
                            "arXiv:2110.07602")
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    length: int = setting(30, "rows per attention", alias=("num_virtual_tokens",))
    hidden: int = setting(0, "width of the MLP that makes the rows; 0 trains them directly")

    def prompt(self, anatomy: Anatomy) -> Sides:
        if self.targets is not None:
            raise RecipeError("prefix takes no targets: it stands before every attention")
        if self.length < 1:
            raise RecipeError(f"prefix(length={self.length}): expected at least one row")
        sites = list(attentions(anatomy))
        if not sites:
            raise RecipeError("prefix: this model has no attention in its blocks")
        chosen = getattr(getattr(anatomy.model, "config", None), "_attn_implementation", None)
        if chosen in _OTHER:
            raise RecipeError(f"prefix: the model computes attention with {chosen!r}, where rows "
                              "cannot be put before the keys; load it with "
                              "attn_implementation='sdpa'")
        return Sides(self, sites)

    def finished(self) -> Prefix:
        return replace(self, hidden=0)

    def count(self, layers: int, width: int, d: int = 0) -> int:
        """Trainable parameters over `layers` attentions with keys of this width."""
        if not self.hidden:
            return 2 * layers * self.length * width
        return self.length * d + (d + 1) * self.hidden + layers * 2 * width * (self.hidden + 1)


@dataclass(frozen=True)
class Sides:
    """Rows before the keys and values of these attentions: (path, width of the keys)."""

    method: Prefix
    sites: list[tuple[str, int]]

    def install(self, attacher: Any, part: Method) -> None:
        m = self.method
        width = attacher.anatomy.hidden_size or self.sites[0][1]
        trunk = Trunk(m.length, width, m.hidden) if m.hidden else None
        for path, keys in self.sites:
            rows = KeysValues(attacher.state, attacher.adapter.name, m.length, keys, trunk)
            rows.to(attacher.device(path)).listen(attacher.slot(path), part.name)


def attentions(anatomy: Anatomy):
    """(path, width of its keys) of every self- and cross-attention of the blocks."""
    for number, block in enumerate(anatomy.blocks):
        for path, prefix in ((block.attn, ""), (block.cross, "cross_")):
            if path is not None:
                yield path, _key_width(anatomy, number, block, prefix)


def _key_width(anatomy: Anatomy, number: int, block: Block, prefix: str) -> int:
    mine = [p for p in anatomy.places if p.block == number]
    for place in mine:
        for p in (place, *anatomy.slices(place)):
            if p.role == f"{prefix}k":
                return p.out if p.rows is None else p.rows[1] - p.rows[0]
    fused = next((p for p in mine if p.role == f"{prefix}qkv"), None)
    if fused is not None and block.heads and block.kv_heads:
        return fused.out * block.kv_heads // (block.heads + 2 * block.kv_heads)
    raise RecipeError(f"prefix: the width of the keys in {block.path} cannot be told from its "
                      "weights")
