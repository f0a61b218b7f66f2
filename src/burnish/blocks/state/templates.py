"""Texts in templates: a few tokens with a mask behind each text, and what is said at the mask.

    x (B, T), n real tokens each   ->   M B rows [x_1 .. x_{n-1}; template_m; x_n], then padding

x_n, the last real token, is the separator that ends a text. Rows of one template follow each other:
row m B + b is sample b in template m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def written(ids: Tensor, mask: Tensor, templates: Sequence[Sequence[int]], word: int, pad: int
            ) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, attention mask, where the mask `word` is) of all rows: (M B, T + K), (M B, T + K),
    (M B,), K the longest template. Padding may stand on either side, and comes behind."""
    B, T = ids.shape
    K = max(map(len, templates))
    order = mask.long().argsort(dim=1, descending=True, stable=True)     # real tokens first
    x, n = ids.gather(1, order), mask.long().sum(1, keepdim=True)
    at = torch.arange(T + K, device=ids.device).expand(B, -1)
    rows, seen, where = [], [], []
    for template in templates:
        k = len(template)
        t = torch.tensor(template, device=ids.device)
        text = x.gather(1, (at - k * (at >= n - 1)).clamp(0, T - 1))
        inside = (at >= n - 1) & (at < n - 1 + k)
        row = torch.where(inside, t[(at - n + 1).clamp(0, k - 1)], text)
        real = at < n + k
        rows.append(torch.where(real, row, pad))
        seen.append(real.to(mask.dtype))
        where.append(n[:, 0] - 1 + list(template).index(word))
    return torch.cat(rows), torch.cat(seen), torch.cat(where)


def beside(values: Tensor, mask: Tensor, templates: Sequence[Sequence[int]]) -> Tensor:
    """(M B, T + K): what the tokens have beside them (their segment), in the rows of
    :func:`written`. A template has what the last real token has, padding 0."""
    T, K = values.shape[1], max(map(len, templates))
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    x, last = values.gather(1, order), mask.long().sum(1, keepdim=True) - 1
    at = torch.arange(T + K, device=values.device).expand(len(values), -1)
    found = x.gather(1, torch.minimum(at, last.clamp(min=0)))
    return torch.cat([torch.where(at <= last + len(t), found, 0) for t in templates])


def scores(logits: Tensor, words: Sequence[Sequence[int]], templates: int) -> Tensor:
    """(M B, V) -> (B, C): of each class the mean, over templates and its words, of the logits."""
    z = torch.stack([logits[:, list(of)].mean(1) for of in words], 1)
    return z.view(templates, -1, len(words)).mean(0)


@contextmanager
def only_at(body: nn.Module, where: Tensor) -> Iterator[None]:
    """Inside, the body of a model gives the state of one token a row, (rows, 1, D), so that what
    comes behind it makes logits of that token alone."""
    def cut(module: nn.Module, args: Any, out: Any) -> Any:
        h = out if isinstance(out, Tensor) else out[0]
        h = h[torch.arange(len(h), device=h.device), where.to(h.device)].unsqueeze(1)
        if isinstance(out, Tensor):
            return h
        if isinstance(out, tuple):
            return (h, *out[1:])
        out["last_hidden_state"] = h
        return out

    hook = body.register_forward_hook(cut)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def through(table: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, what an embedding gives is changed on its way."""
    hook = table.register_forward_hook(lambda module, args, out: change(out))
    try:
        yield
    finally:
        hook.remove()


def filled(tokens: Tensor, where: Tensor, words: Tensor) -> Tensor:
    """The rows with these words (rows,) in place of their masks."""
    return tokens.scatter(1, where.unsqueeze(1), words.unsqueeze(1))
