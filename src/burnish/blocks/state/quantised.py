"""Product quantisation of queries and keys: which words of small codebooks they are nearest to.

    z = [z_1 .. z_S]        code_s = argmin_w |z_s - C_s,w|_1        z^ = [C_1,code_1 .. C_S,code_S]

The codebooks are learned by what they say of z, once with its nearest word and once with all words
by how near they are (the same z^ on one side, so words that are not chosen are drawn along):

    L(z) = mean (z - z^)^2 + mean (sum_w p_w C_w - z^)^2,     p_w ~ 1 / |z_s - C_s,w|_1

Letters: B batch, H heads, T tokens, h width of a head, S sub-spaces of width w = h / S, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tape.executor import checkpoint

#: a distance below it counts as this
NEAREST = 1e-6


class Codebook(nn.Module):
    """W words for each sub-space of a head, shared by its heads, by queries and by keys.

    words (S, W, w), normal of deviation 1: W h numbers. RecipeError is the caller's where w does
    not divide h.
    """

    def __init__(self, h: int, words: int, width: int):
        super().__init__()
        self.words = nn.Parameter(torch.randn(h // width, words, width))
        self.words.burnish_decay = False             # type: ignore[attr-defined]

    def distances(self, z: Tensor) -> Tensor:
        """|z_s - C_s,w|_1, (S, N, W), of z (..., h) with N rows; in fp32 at least."""
        wide = torch.promote_types(z.dtype, torch.float32)
        parts = z.to(wide).reshape(-1, len(self.words), self.words.shape[-1]).transpose(0, 1)
        return torch.cdist(parts, self.words.to(wide), p=1.0)

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """(S, ...) of z (..., h): numbers of words, one byte each."""
        return self.distances(z).argmin(-1).to(torch.uint8).view(-1, *z.shape[:-1])

    def loss(self, z: Tensor, valid: Tensor | None = None) -> Tensor:
        """L(z) of z (B, H, T, h), padding left out where valid (B, T) says what is none. Kept for
        backward: z alone."""
        return checkpoint(self, self._loss, (z, valid), {})

    def _loss(self, z: Tensor, valid: Tensor | None) -> Tensor:
        d = self.distances(z)
        words = self.words.to(d.dtype)
        near = words.gather(1, d.argmin(-1, keepdim=True).expand(-1, -1, words.shape[-1]))
        soft = torch.softmax(-d.clamp_min(NEAREST).log(), -1) @ words
        hard = z.to(d.dtype).reshape(-1, *words.shape[::2]).transpose(0, 1) - near
        off = hard.square().mean((0, 2)) + (soft - near).square().mean((0, 2))
        if valid is None:
            return off.mean()
        count = valid[:, None, :].expand(z.shape[:-1]).reshape(-1).to(d.dtype)
        return (off * count).sum() / count.sum().clamp_min(1)
