"""Which patches of a picture a model has begun to look at, or looks at most; what it mistakes.

    map (B, P)      mean over heads and queries of the attention to each patch, of length 1
    D = t - s       t of the model before tuning, s of the tuned one
    chosen          where max |D| > limit the k patches with the largest D, else with the largest s
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.errors import ConfigError

SDPA = F.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


class Maps(TorchFunctionMode):
    """Inside, sees how much the queries of one attention look at each key: `seen` (B, T), the mean
    over heads and queries. Only the attention at hand is computed twice."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention, self.inside, self.handles = attention, 0, list[Any]()
        self.seen: Tensor | None = None

    def __enter__(self) -> Maps:
        def step(by: int) -> Any:
            def moved(*_: Any) -> None:
                self.inside += by
            return moved

        self.handles = [self.attention.register_forward_pre_hook(step(1)),
                        self.attention.register_forward_hook(step(-1), always_call=True)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.inside and func is SDPA:
            given = dict(zip(_NAMES, args, strict=False)) | kwargs
            q, k = given["query"].detach(), given["key"].detach()
            wide = torch.promote_types(q.dtype, torch.float32)
            scale = given.get("scale") or q.shape[-1] ** -0.5
            z = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
            if (mask := given.get("attn_mask")) is not None:
                z = z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else \
                    z + mask.detach().to(wide)
            self.seen = z.softmax(-1).mean((1, 2))
        return func(*args, **kwargs)

    def map(self, patches: int) -> Tensor:
        """(B, patches), of length 1: the last keys, since class tokens and prompts stand before."""
        if self.seen is None:
            raise ConfigError(f"{type(self.attention).__name__} computed its attention without "
                              "F.scaled_dot_product_attention; load the model with "
                              "attn_implementation='sdpa'")
        if self.seen.shape[1] < patches:
            raise ConfigError(f"the attention sees {self.seen.shape[1]} tokens, and the picture "
                              f"has {patches} patches: it looks at windows of them, or at a map "
                              "that was made smaller")
        return F.normalize(self.seen[:, -patches:], dim=1)


def chosen(before: Tensor, now: Tensor, k: int, limit: float) -> Tensor:
    """(B, P) of 0 and 1: the k patches of each sample."""
    gone = before - now
    score = torch.where(gone.abs().amax(1, keepdim=True) > limit, gone, now)
    at = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(score).scatter_(1, at, 1.0)


def spread(mask: Tensor, shape: torch.Size, size: tuple[int, int]) -> Tensor:
    """A mask of patches as one of pixels (B, 1, H, W), patches of `size` row by row."""
    rows, columns = shape[-2] // size[0], shape[-1] // size[1]
    m = mask.view(-1, 1, rows, columns)
    return m.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)


def mistaken(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(C, C): how often samples of class i are taken for class j; 0 for j = i."""
    counts = torch.zeros(classes, classes, dtype=torch.float32, device=logits.device)
    counts.index_put_((labels, logits.argmax(1)), torch.ones(()).to(counts), accumulate=True)
    return counts.fill_diagonal_(0)
