"""The small models of plain torch, and what they are made of."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.draw import drawn

CLASSES = 3


class Plain(nn.Module):
    """A classifier over `x` that returns logits and, given labels, their cross-entropy."""

    shape: tuple[int, ...] = (8, 32)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.logits(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def example(self, samples: int) -> dict[str, Tensor]:
        """A seeded batch of `samples`."""
        with drawn(0):
            return {"x": torch.randn(samples, *self.shape),
                    "labels": torch.arange(samples) % CLASSES}


class Attention(nn.Module):
    """Self-attention with one fused projection, named as in timm."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(B, T, D)))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x)))."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Pictures to tokens."""

    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(Plain):
    """A ViT with timm's module names and fused qkv."""

    shape = (3, 16, 16)

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.patch_embed = PatchEmbed(4, 32)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 32) * 0.02)
        self.blocks = nn.Sequential(*(Block(32, 4, dropout) for _ in range(2)))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(Plain):
    """`nn.TransformerEncoder` and a head."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32),
                                             enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class AttentionPool(Plain):
    """`nn.MultiheadAttention` used directly, over a projection of the input."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Linear(32, 32)
        self.attn = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y, _ = self.attn(x, x, x, need_weights=False)
        return self.head(self.norm(x + y).mean(1))


class Cnn(Plain):
    """Two convolutions with batch norm, and a head."""

    shape = (3, 16, 16)

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        self.classifier = nn.Linear(32, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Perceptron(Plain):
    """Linear layers and nothing else."""

    shape = (32,)

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(dropout),
                                    nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))
