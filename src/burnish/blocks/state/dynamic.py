"""Prompts that a sample's own features make, inside a bottleneck.

    Q' = softmax(Q Z^T / sqrt(R)) Z,    Z' = Z + softmax(Z Q'^T / sqrt(R)) Q'

Learned queries Q (M, R) read what is there of a sample, and its tokens read that. Two softmaxes of
M numbers a token, whatever the number of tokens.

Letters: B samples, N tokens, R width of the bottleneck, M queries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError


class Dynamic(nn.Module):
    """A mixer of a bottleneck: Z' (B, N, R) of Z. rows (M, R) begin normal.

    text: are the tokens those that the call's mask speaks of, but for some in front of them?
    """

    def __init__(self, length: int, width: int, text: bool = True):
        super().__init__()
        self.text = text
        self.rows = nn.Parameter(torch.randn(length, width))

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 3:
            raise RecipeError("dvpt reads (batch, tokens, width); a layer is given "
                              f"{tuple(z.shape)}")
        made = self.queries(z)
        return z + _shares(z @ made.mT, z.shape[-1]) @ made

    def queries(self, z: Tensor) -> Tensor:
        """Q', (B, M, R): tokens of padding are not read."""
        scores = self.rows.to(z.dtype) @ z.mT
        if (valid := context().valid) is not None:
            scores = scores.masked_fill(~self.counting(valid, z).bool().unsqueeze(1), -math.inf)
        return _shares(scores, z.shape[-1]) @ z

    def counting(self, valid: Tensor, z: Tensor) -> Tensor:
        """(B, N): the mask of z's tokens; a prompt in front of the text counts."""
        front = z.shape[1] - valid.shape[1]
        if len(valid) != len(z) or front < 0 or front and not self.text:
            raise RecipeError(f"dvpt leaves out tokens of padding, and a layer is given "
                              f"{tuple(z.shape[:2])} tokens beside a mask of {tuple(valid.shape)}: "
                              "which of them count cannot be told")
        return F.pad(valid, (front, 0), value=1)


def _shares(scores: Tensor, width: int) -> Tensor:
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return (wide / math.sqrt(width)).softmax(-1).to(scores.dtype)


class Lent(nn.Module):
    """``s f(h)``: f is one module for several places. Who `owns` it holds it, the others borrow it;
    s is a place's own, and trains where it is said."""

    f: nn.Module

    def __init__(self, f: nn.Module, owns: bool, scale: float, train_scale: bool):
        super().__init__()
        if owns:
            self.f = f
        else:
            self.__dict__["f"] = f
        self.scale = nn.Parameter(torch.tensor(float(scale))) if train_scale else scale
        if isinstance(self.scale, nn.Parameter):
            self.scale.burnish_decay = False         # type: ignore[attr-defined]

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another place holds, for whoever runs this again in backward."""
        return () if "f" in self._modules else tuple(self.f.parameters())

    def forward(self, h: Tensor) -> Tensor:
        s = self.scale
        y: Tensor = self.f(h) * (s.to(h.dtype) if isinstance(s, Tensor) else s)
        return y
