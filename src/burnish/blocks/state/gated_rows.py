"""Rows that an attention reads beside its own keys and values, by themselves and behind a gate.

    y = Attn(q, K, V) + g softmax(s q P_k^T) P_v,   P_k = P W_k^T + b_k,  P_v = P W_v^T + b_v

P (L, D) enters the layer's own projections, with whatever is added to them; q and s are the
attention's own, q as the attention sees it (behind rotary positions; the rows stand nowhere).

Letters: B batch, T tokens, L rows, D width of what the projections read, H heads of queries, h
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attending import SDPA, Attending, as_heads, named

#: (path of a projection below the attention, the rows of its outputs, None: all of them)
Source = tuple[str, tuple[int, int] | None]


class GatedRows(Attending):
    """Listens to one attention. rows (L, D) begin N(0, 1), gate (1,) or one number for each head
    at 0: then nothing is added. sources: what makes keys and values of the rows. squash: the gate
    is its tanh.
    """

    what = "a prompt"
    part = "adaption_prompt"

    def __init__(self, state: Any, adapter: str, length: int, width: int, gates: int,
                 sources: Sequence[Source], squash: bool):
        super().__init__(state, adapter)
        self.sources, self.squash = tuple(sources), squash
        self.rows = nn.Parameter(torch.randn(length, width))
        self.gate = nn.Parameter(torch.zeros(gates))

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        out = func(*args, **kwargs)
        given = named(args, kwargs)
        q, v = given["query"], given["value"]
        P = self.rows.to(q.dtype).unsqueeze(0)
        made = {path: module.get_submodule(path)(P) for path, _ in dict.fromkeys(self.sources)}
        K, V = (as_heads(made[path][..., slice(*(run or (None,)))], len(q), q.shape[1], h)
                for (path, run), h in zip(self.sources, (q.shape[-1], v.shape[-1]), strict=True))
        gate = torch.tanh(self.gate) if self.squash else self.gate
        # no other answer is asked: the rows alone are read
        return out + SDPA(q, K, V, scale=given.get("scale")) * gate.to(out.dtype).view(-1, 1, 1)
