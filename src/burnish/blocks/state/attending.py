"""Attention answered otherwise: in the place of ``F.scaled_dot_product_attention`` within a module.

What a listener sees is what the attention sees, behind rotary positions and norms of queries and
keys. Which attentions can be answered so is read off an anatomy here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.errors import RecipeError
from .prompts import Listener

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

SDPA = F.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Attending(Listener):
    """Answers for ``F.scaled_dot_product_attention`` within one attention: :meth:`attend`.

    part: the method's name, for what is refused.
    """

    what = "an attention"
    part = ""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        met = []

        def attend(func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
            met.append(func)
            return self.attend(module, func, args, kwargs)

        with self.state.tape.answering({SDPA: attend}):
            out = call(*args, **kw)
        if not met:
            raise RecipeError(f"{self.part}: {type(module).__name__} computed its attention "
                              "without F.scaled_dot_product_attention; load the model with "
                              "attn_implementation='sdpa'")
        return out

    def attend(self, module: nn.Module, func: Callable[..., Tensor], args: tuple, kwargs: dict
               ) -> Tensor:
        """The function's answer."""
        raise NotImplementedError


def named(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``F.scaled_dot_product_attention`` by name."""
    return dict(zip(_NAMES, args, strict=False)) | kwargs


class _Told(TorchFunctionMode):
    def __init__(self, told: Callable[[dict[str, Any]], None]):
        super().__init__()
        self.told = told

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self.told(named(args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def watched(model: nn.Module, paths: Iterable[str],
            told: Callable[[str, dict[str, Any]], None]) -> Iterator[None]:
    """Inside, `told(path, arguments by name)` whenever one of these modules, run by `model`, calls
    ``F.scaled_dot_product_attention``."""
    inside: list[str] = []

    def enter(path: str) -> Any:
        return lambda *_: inside.append(path)

    def leave(*_: Any) -> None:
        if inside:                                   # not so where its run has failed
            inside.pop()

    hooks: list[Any] = []
    for path in paths:
        attention = model.get_submodule(path)
        hooks += [attention.register_forward_pre_hook(enter(path)),
                  attention.register_forward_hook(leave, always_call=True)]
    try:
        with _Told(lambda given: told(inside[-1], given) if inside else None):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def as_heads(rows: Tensor, batch: int, heads: int, h: int) -> Tensor:
    """Keys or values (1 or B, L, own heads h) as (batch, heads, L, h): heads of few are repeated
    for queries."""
    rows = rows.unflatten(-1, (-1, h)).transpose(1, 2)
    if rows.shape[1] != heads:
        rows = rows.repeat_interleave(heads // rows.shape[1], 1)
    return rows.expand(batch, -1, -1, -1)


def open_attentions(anatomy: Anatomy, part: str) -> tuple[str, ...]:
    """Paths of the self-attentions of the blocks. RecipeError (in the name of `part`) where there
    is none, or one that computes otherwise than by ``F.scaled_dot_product_attention``."""
    paths = tuple(b.attn for b in anatomy.blocks if b.attn)
    if not paths:
        raise RecipeError(f"{part}: this model has no attention in its blocks")
    for path in paths:
        if isinstance(anatomy.model.get_submodule(path), nn.MultiheadAttention):
            raise RecipeError(f"{part}: {path} is an nn.MultiheadAttention, which gives its "
                              "queries and keys to nobody")
    chosen = getattr(getattr(anatomy.model, "config", None), "_attn_implementation", "sdpa")
    if chosen not in ("sdpa", None):
        raise RecipeError(f"{part}: the model computes attention with {chosen!r}; load it with "
                          "attn_implementation='sdpa'")
    return paths
