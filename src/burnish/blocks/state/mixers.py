"""What may stand in the narrow space of a bottleneck and look at more than one token.

Letters: B batch, T tokens, R channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError


class Conformer(nn.Module):
    """``silu(BN(conv(glu(z))))``: z (B, T, 2 R), the convolution over tokens, channel by channel.

    conv.weight (R, 1, K), norm.weight and norm.bias (R,): R (K + 2) numbers. (The norm would take a
    bias of the convolution away.)
    As many tokens come out as go in; beyond the ends, and where the call's attention mask says
    padding, are zeros, which the norm's statistics leave out. A token sees K - 1 others, behind it
    too. Running statistics are buffers, and stay fp32.

    RecipeError for states without a batch and a token axis, and in training for one number per
    channel, which has no variance.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, groups=width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.norm.weight.burnish_decay = self.norm.bias.burnish_decay = False

    def _apply(self, fn, *args, **kw):                       # type: ignore[no-untyped-def]
        super()._apply(fn, *args, **kw)
        for name in ("running_mean", "running_var"):         # small steps would be lost in them
            held = getattr(self.norm, name)
            if held.dtype in (torch.float16, torch.bfloat16):
                setattr(self.norm, name, held.float())
        return self

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() < 3:
            raise RecipeError(f"a convolution over tokens is given states of {tuple(z.shape)}; "
                              "expected (batch, tokens, channels)")
        if self.training and z.shape[:-1].numel() < 2:
            raise RecipeError("a batch norm over a single token has no variance to learn from: "
                              "train with two or more")
        u = F.glu(z, -1)
        u_BTR = u.flatten(1, -2)
        valid = context().valid
        if valid is not None and valid.shape != u_BTR.shape[:2]:
            valid = None
        if valid is not None:
            u_BTR = u_BTR * valid.unsqueeze(-1).to(u.dtype)
        K = self.conv.kernel_size[0]
        u_BRT = F.pad(u_BTR.transpose(1, 2), ((K - 1) // 2, K // 2))
        y = F.conv1d(u_BRT, self.conv.weight.to(u.dtype), groups=len(self.conv.weight))
        return F.silu(self._normed(y, valid)).transpose(1, 2).reshape(u.shape)

    def _normed(self, y: Tensor, valid: Tensor | None) -> Tensor:
        """The batch norm, in the precision of its statistics."""
        m, wide = self.norm, self.norm.running_mean.dtype
        if self.training:
            m.num_batches_tracked.add_(1)
        if self.training and valid is not None:
            return self._of_valid(y.to(wide), valid.to(wide).unsqueeze(1)).to(y.dtype)
        return F.batch_norm(y.to(wide), m.running_mean, m.running_var, m.weight.to(wide),
                            m.bias.to(wide), self.training, m.momentum, m.eps).to(y.dtype)

    def _of_valid(self, y_BRT: Tensor, counts_B1T: Tensor) -> Tensor:
        """The batch norm in training, with statistics of the tokens that count."""
        m = self.norm
        n = counts_B1T.sum().clamp_min(1)
        mean = (y_BRT * counts_B1T).sum((0, 2)) / n
        off_BRT = y_BRT - mean[:, None]
        var = (off_BRT.square() * counts_B1T).sum((0, 2)) / n
        with torch.no_grad():
            rate: Any = m.momentum
            m.running_mean.lerp_(mean.detach(), rate)
            m.running_var.lerp_(var.detach() * (n / (n - 1).clamp_min(1)), rate)
        by = m.weight.to(mean) * (var + m.eps).rsqrt()
        return off_BRT * by[:, None] + m.bias.to(mean)[:, None]

    @staticmethod
    def count(width: int, kernel: int) -> int:
        """Trainable numbers."""
        return width * (kernel + 2)


class Temporal(nn.Module):
    """``gelu(conv(z))``: z (B, T, R), the convolution over tokens, all channels with all.

    conv.weight (R, R, K), conv.bias (R,). As many tokens come out as go in; beyond the ends, and
    where the call's attention mask says padding, are zeros. RecipeError for states without a batch
    and a token axis.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel)

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 3:
            raise RecipeError(f"a convolution over tokens is given states of {tuple(z.shape)}; "
                              "expected (batch, tokens, channels)")
        valid = context().valid
        if valid is not None and valid.shape == z.shape[:2]:
            z = z * valid.unsqueeze(-1).to(z.dtype)
        K, conv = self.conv.kernel_size[0], self.conv
        z = F.pad(z.mT, ((K - 1) // 2, K // 2))
        assert conv.bias is not None
        return F.gelu(F.conv1d(z, conv.weight.to(z.dtype), conv.bias.to(z.dtype))).mT

    @staticmethod
    def count(width: int, kernel: int) -> int:
        """Trainable numbers."""
        return width * width * kernel + width
