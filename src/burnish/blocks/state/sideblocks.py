"""The blocks of a side network: a block's own class at a fraction of its widths, or a plain one.

Letters: D backbone width, S side width, R = D / S.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError

#: settings of a config that are widths and shrink with the side network; head counts stay
WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "intermediate_size", "n_inner",
          "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "head_dim",
          "d_kv", "moe_intermediate_size", "shared_expert_intermediate_size")


class Plain(nn.Module):
    """A pre-norm transformer block of width S, for backbones whose own class cannot be shrunk."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        B, T, S = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.proj(a.transpose(1, 2).reshape(B, T, S))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Watch:
    """Sees how a block masks its attention, so that a plain side block masks the same way."""

    def __init__(self, tape: Any):
        self.tape, self.seen = tape, None

    def __enter__(self) -> None:
        sdpa, mha = F.scaled_dot_product_attention, F.multi_head_attention_forward
        self._inside = self.tape.answering({sdpa: self._sdpa, mha: self._mha})
        self._inside.__enter__()

    def __exit__(self, *_: Any) -> None:
        self._inside.__exit__(None, None, None)

    def _sdpa(self, func: Any, args: tuple, kw: dict) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kw
        self.seen = given.get("attn_mask"), bool(given.get("is_causal"))
        return func(*args, **kw)

    def _mha(self, func: Any, args: tuple, kw: dict) -> Any:
        given = inspect.signature(func).bind(*args, **kw).arguments
        if given.get("attn_mask") is not None or given.get("key_padding_mask") is not None:
            raise RecipeError("lst: a masked nn.MultiheadAttention has no side block yet; only "
                              "unmasked ones and transformers models do")
        self.seen = None, False
        return func(*args, **kw)

    def mask(self) -> tuple[Tensor | None, bool]:
        """(mask, causal) of the attention that ran last."""
        if self.seen is None:
            raise RecipeError("lst: this block computes no attention that can be seen, so a side "
                              "block could look where it may not; load the model with "
                              "attn_implementation='sdpa'")
        return self.seen

    def causal(self) -> bool:
        """Of an attention without a mask: the whole of what is to be known of it."""
        mask, causal = self.mask()
        if mask is not None:
            raise RecipeError("lst(cache=...): plain side blocks read the mask of an attention "
                              "that would not run; leave cache out")
        return causal


#: what says in a constructor that a block owns the relative positions its stack shares
TABLE = "has_relative_attention_bias"


def shrunk(block: nn.Module, config: Any, reduction: int, number: int, layers: int,
           table: bool = False) -> nn.Module | None:
    """A fresh block of the same class at 1/R of every width, or None where that cannot be built.

    Widths of the config shrink, the number of heads stays. number: which of the `layers` blocks it
    stands beside; in a key-value cache it is layer ``layers + number``. table: where the class
    asks, the block owns the table of relative positions that those behind it share.
    """
    cls = getattr(type(block), "_burnish_base", type(block))
    wanted = inspect.signature(cls.__init__).parameters
    own = next((m.config for m in block.modules() if hasattr(m, "config")), config)
    if own is None or "config" not in wanted:
        return None
    small = copy.deepcopy(own)
    for name in WIDTHS:
        value = getattr(small, name, None)
        if isinstance(value, int) and name not in getattr(small, "attribute_map", {}):
            if value % reduction:
                raise RecipeError(f"a side network needs {name} = {value} divisible by the "
                                  f"reduction; {reduction} does not divide it")
            setattr(small, name, value // reduction)
            if value // reduction % 8 and \
                    getattr(small, "_experts_implementation", None) == "grouped_mm":
                small._experts_implementation = "batched_mm"     # grouped ones want 16 bytes
    told = {"config": small, "layer_idx": number, TABLE: table}
    made = cls(**{k: v for k, v in told.items() if k in wanted})
    for m in made.modules():
        if hasattr(m, "layer_idx"):
            m.layer_idx = layers + number
    made.reduction, made.beside, made.cache_index = reduction, number, layers + number
    return made
