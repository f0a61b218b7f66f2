from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ...blocks.state.keys_values import KeysValues, OwnMass, Seen, Trunk
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ..delta.lowrank.lora import check_dropout
from ._stacks import attentions, check_ids, move_tokens, read_words

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

_OTHER = ("eager", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """Prefix tuning: trainable rows before the keys and the values of every attention.

    ``K' = [P_k; K]``, ``V' = [P_v; V]``, P_k and P_v (length, H h) per attention with H heads of
    keys of width h (fewer than those of queries under grouped-query attention). Equal to a gated
    sum: ``(1 - l) Attn(K, V) + l softmax(q P_k^T) P_v``, l the share of attention the prefix gets.

    The rows join as attention sees them, behind rotary positions; positions of real tokens do not
    move, a key-value cache holds none of the rows, a causal mask hides none of them. With
    moved=True real tokens count from `length` on, as in PEFT, whose folders need it.

    With ``hidden > 0`` the rows are ``up_l tanh(W P' + b)``, P' (length, d) and W (hidden, d)
    shared by all layers; a finished file (``tuned.save``) holds the rows alone, as of ``hidden=0``,
    a checkpoint of a run all of it. Dropout acts on the rows, on each sample's by itself (P-Tuning
    v2: 0.1).

    With ``mass="own"`` (LAE) the rows' share is one, whatever tokens take: ``(1 - l) Attn(K, V) +
    softmax(q (s_k P_k)^T) s_v P_v``, s_k and s_v one number an attention each, from 1 on, so that
    rows learn as fast as other modules do. Two attentions in place of one.

    frozen_rows=1 keeps the first row as it began, an attention sink that training would break; with
    ``init="activations"`` it is the first token's (Cartridges: a document's keys and values, which
    train on conversations about it).

    Start: rows N(0, 0.02^2), or P' normal. ``init="activations"`` starts from the keys and values
    that the pre-trained model gives to real tokens: to the words `ids`, repeated to length (before
    the text where positions are rotary: there the prefix is those words), or to the first `length`
    tokens of ``tune(..., calibration=batches)``, padding left out. With the MLP, up_l is the least
    squares solution. Never the pre-trained function, since the prefix takes a share.
    Trains 2 (length - frozen_rows) H h per attention (own mass: and 2); with the MLP length d +
    (d + 1) hidden once and 2 (hidden + 1) H h per attention. Kept for backward: what frozen blocks
    keep and the extra keys and values, in a causal attention as many queries. Not mergeable.

    Works wherever attention calls ``F.scaled_dot_product_attention``, and on
    ``nn.MultiheadAttention``; eager attention is refused.
    """

    paper: ClassVar[str] = ("Prefix-Tuning (2021), arXiv:2101.00190; P-Tuning v2 (2022), "
                            "arXiv:2110.07602; LAE (2023), arXiv:2303.10070; Cartridges (2025), "
                            "as PEFT describes it")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    length: int = setting(30, "rows per attention", alias=("num_virtual_tokens",))
    hidden: int = setting(0, "width of the MLP that makes the rows; 0 trains them directly")
    dropout: float = setting(0.0, "dropout on the rows")
    init: Literal["normal", "activations"] = setting("normal", "start of the rows")
    ids: tuple[int, ...] | list[int] | None = setting(
        None, "token ids whose activations start the rows; None takes calibration data",
        other=((1, 2, 3),), beside={"init": "activations"})

    mass: Literal["shared", "own"] = setting(
        "shared", "of the rows in attention: a share that tokens leave, or one of their own")
    frozen_rows: int = setting(0, "rows, the first ones, that stay as they began",
                               alias=("num_frozen_tokens",))
    moved: bool = setting(
        False, "real tokens count from length on",
        unseen="not all models count their tokens: tests/methods/test_prefix.py")

    def __post_init__(self) -> None:
        check_dropout("prefix", self.dropout)
        if not 0 <= self.frozen_rows < max(1, self.length):
            raise RecipeError(f"prefix(frozen_rows={self.frozen_rows}): expected fewer than the "
                              f"{self.length} rows (length), so that one trains")
        if self.frozen_rows and (self.hidden or self.mass == "own"):
            raise RecipeError("prefix(frozen_rows=...): rows stay as they are where they train "
                              "directly (hidden=0) and none scales them (mass='shared')")

    def prompt(self, anatomy: Anatomy) -> Sides:
        if self.targets is not None:
            raise RecipeError("prefix takes no targets: it stands before every attention")
        if self.length < 1:
            raise RecipeError(f"prefix(length={self.length}): expected at least one row")
        check_ids(self, "activations")
        sites = list(attentions(anatomy))
        if not sites:
            raise RecipeError("prefix: this model has no attention in its blocks")
        chosen = getattr(getattr(anatomy.model, "config", None), "_attn_implementation", None)
        if chosen in _OTHER:
            raise RecipeError(f"prefix: the model computes attention with {chosen!r}, where rows "
                              "cannot be put before the keys; load it with "
                              "attn_implementation='sdpa'")
        if self.mass == "own" and (met := next(
                (p for p, _ in sites if isinstance(anatomy.model.get_submodule(p),
                                                   nn.MultiheadAttention)), None)):
            raise RecipeError(f"prefix(mass='own'): {met} is an nn.MultiheadAttention, which keeps "
                              "its softmax to itself; expected mass='shared'")
        return Sides(self, sites)

    def finished(self) -> Prefix:
        return replace(self, hidden=0)

    def count(self, layers: int, width: int, d: int) -> int:
        """Trainable parameters over `layers` attentions with keys of this width, states of d."""
        own = 2 * layers * (self.mass == "own")
        if not self.hidden:
            return 2 * layers * (self.length - self.frozen_rows) * width + own
        once = self.length * d + (d + 1) * self.hidden
        return once + layers * 2 * width * (self.hidden + 1) + own


@dataclass(frozen=True)
class Sides:
    """Rows before the keys and values of these attentions: (path, width of the keys)."""

    method: Prefix
    sites: list[tuple[str, int]]

    def install(self, attacher: Any, part: Method) -> None:
        m = self.method
        width = attacher.anatomy.hidden_size
        trunk = Trunk(m.length, width, m.hidden) if m.hidden else None
        banks: dict[str, KeysValues] = {}
        for path, keys in self.sites:
            kind = OwnMass if m.mass == "own" else KeysValues
            banks[path] = kind(attacher.state, attacher.adapter.name, m.length, keys, trunk,
                               dropout=m.dropout, frozen=m.frozen_rows).to(attacher.device(path))
            banks[path].listen(attacher.slot(path), part.name)
        if m.moved:
            move_tokens(attacher, part, m.length)
        if m.init == "activations":
            self.begin(attacher, part, banks)

    def begin(self, attacher: Any, part: Method, banks: dict[str, KeysValues]) -> None:
        """Start the rows from the keys and values that the model gives to real tokens."""
        with Seen(attacher.model, dict(self.sites), self.method.length) as seen:
            ran = attacher.rehearse(part, lambda: seen.done) if self.method.ids is None else \
                read_words(attacher, part, self.method)
        for path, bank in banks.items() if ran else ():
            bank.begin(seen.rows(path))
