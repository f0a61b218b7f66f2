"""What a language model gets wrong, token by token, and a small decoder that foretells it.

    l_t = p_t - q_t        p_t one-hot of the next token, q_t the model's softmax: (V,)

Of q only the largest entries are kept beside the token, so a record is 2 K + 1 numbers a token.
Letters: B samples, T tokens, V words, K kept, D width of the model, S width of the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Record:
    """A batch: words (B, T, K) and their q; token (B, T), what came next; h (B, T, D), the mean of
    the model's states over its layers; asked (B, T), which tokens it is to learn from; valid
    (B, T), which are no padding."""

    words: Tensor
    q: Tensor
    token: Tensor
    h: Tensor
    asked: Tensor
    valid: Tensor


def error(record: Record, vocabulary: int) -> Tensor:
    """l, (B, T, V), made again."""
    l_BTV = record.q.new_zeros(*record.token.shape, vocabulary)
    l_BTV.scatter_(-1, record.words, -record.q)
    return l_BTV.scatter_add_(-1, record.token.unsqueeze(-1), torch.ones_like(record.q[..., :1]))


def corrected(q_BTV: Tensor, f_BTV: Tensor, strength: float) -> Tensor:
    """``q + strength f``, clipped at 0 and summing to 1 (where nothing is left, q); q itself at
    strength 0."""
    if strength == 0:
        return q_BTV
    moved = (q_BTV + strength * f_BTV).clamp_min(0)
    total = moved.sum(-1, keepdim=True)
    return torch.where(total > 0, moved / total.clamp_min(1e-30), q_BTV)


def righted(logits_BTV: Tensor, f_BTV: Tensor, strength: float) -> Tensor:
    """Logits whose softmax is :func:`corrected`; those given, bit for bit, where f is 0 and where
    nothing would be left."""
    z = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    moved = (z.softmax(-1) + strength * f_BTV).clamp_min(0)
    said = z.logsumexp(-1, keepdim=True) + moved.clamp_min(1e-30).log()
    stays = (f_BTV == 0) | (moved.sum(-1, keepdim=True) == 0)
    return torch.where(stays, z, said).to(logits_BTV.dtype)


class Corrector(nn.Module):
    """f_t of l_s for s < t and of h_s for s <= t: (B, T, V).

    ``2 V S`` numbers in and out, D S for the states, and a decoder's blocks: causal attention,
    causal attention to the states, an MLP. What goes out starts at 0.
    """

    def __init__(self, vocabulary: int, states: int, width: int, blocks: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, width) / math.sqrt(width))
        self.first = nn.Parameter(torch.zeros(width))
        self.read = nn.Linear(states, width)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, batch_first=True,
                                       norm_first=True, activation="gelu") for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocabulary)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, record: Record) -> Tensor:
        said = self.table[record.token] - (record.q.to(self.table).unsqueeze(-1)
                                           * self.table[record.words]).sum(-2)
        before = torch.cat([self.first.expand(len(said), 1, -1), said[:, :-1]], 1)
        later = torch.ones(said.shape[1], said.shape[1], dtype=torch.bool,
                           device=said.device).triu(1)
        left = ~record.valid
        left = left & record.valid.cumsum(1).bool()      # in front of a text nothing is left out
        s, h = before, self.read(record.h.to(self.table))
        for block in self.blocks:
            s = block(s, h, later, later, tgt_key_padding_mask=left, memory_key_padding_mask=left)
        return self.out(self.norm(s))

    def loss(self, record: Record) -> Tensor:
        """``sqrt(mean |f - l|^2)`` over the tokens that are asked for."""
        f, asked = self(record), record.asked
        apart = (f - error(record, f.shape[-1]).to(f)).square().sum(-1) * asked
        return (apart.sum() / asked.sum()).clamp_min(1e-30).sqrt()
