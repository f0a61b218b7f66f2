"""How much of what attention reads lies in one stretch of a text.

Letters: H heads, R rows that are looked at, T tokens, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rows(given: Mapping[str, Any], at_R: Tensor) -> Tensor:
    """(H, R, T): the attention of the tokens at `at_R`, made of the arguments of one
    ``F.scaled_dot_product_attention`` over one text: no other row is made."""
    q, k = given["query"][0], given["key"][0]
    if len(k) != len(q):                                 # few keys serve many queries
        k = k.repeat_interleave(len(q) // len(k), 0)
    scale = given.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q[:, at_R].to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    mask = given.get("attn_mask")
    if mask is not None:
        mask = mask.expand(1, len(q), q.shape[1], k.shape[1])[0][:, at_R]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else \
            scores + mask.to(wide)
    elif given.get("is_causal"):
        later = torch.arange(k.shape[1], device=q.device) > at_R.unsqueeze(-1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1)


def mass(attention_HRT: Tensor, stretch_T: Tensor) -> Tensor:
    """(R,) from 0 to 1: of each row what lies in the stretch, of the head that has most there."""
    return (attention_HRT * stretch_T.to(attention_HRT)).sum(-1).amax(0)
