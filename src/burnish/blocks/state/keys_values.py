"""Rows before the keys and the values of an attention, and what an attention's own are.

    K' = [P_k; K],  V' = [P_v; V]

Both work on any module that calls ``F.scaled_dot_product_attention`` (or is an
``nn.MultiheadAttention``): what they see is what the attention sees, behind rotary positions and
norms of queries and keys.

Letters: B batch, T tokens, L rows added, D width, H heads of keys and values, h width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.call import context
from ...core.errors import DataError, RecipeError
from ..choose.observe import samples
from ..tape.replay import dropout
from .attending import as_heads
from .prompts import Listener, named

_SDPA = F.scaled_dot_product_attention
_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MHA = F.multi_head_attention_forward
_MHA_NAMES = tuple(inspect.signature(_MHA).parameters)


def joined(func: Callable[..., Tensor], given: dict[str, Any], P: Any,
           wider: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The attention `func` of these arguments over ``[P_k; K]`` and ``[P_v; V]``, P_k and P_v (1 or
    B, L, H h). wider: gives a mask over so many keys L open columns. A causal call stays one: L
    queries in front, whose answers are dropped."""
    given = dict(given)
    q, k, v = (given.pop(n) for n in _SDPA_NAMES[:3])
    if given.get("attn_mask") is not None:
        given["attn_mask"] = wider(given["attn_mask"], k.shape[-2])
    ahead = P[0].shape[1] if given.get("is_causal") else 0
    if ahead:
        q = F.pad(q, (0, 0, ahead, 0))
    K, V = (torch.cat([as_heads(rows.to(t.dtype), *t.shape[:2], t.shape[-1]), t], -2)
            for rows, t in zip(P, (k, v), strict=True))
    out = func(q, K, V, **given)
    return out[..., ahead:, :] if ahead else out


def opened(mask: Tensor, keys: int, L: int) -> Tensor:
    """A mask over so many keys with L open columns before them."""
    return F.pad(mask.expand(*mask.shape[:-1], keys), (L, 0), value=mask.dtype == torch.bool)


class Trunk(nn.Module):
    """The shared part of a prefix's MLP: ``tanh(W P' + b)``; P' (L, D), W (M, D)."""

    def __init__(self, length: int, width: int, hidden: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, width))
        self.down = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        return torch.tanh(self.down(self.rows))


class KeysValues(Listener):
    """Rows before the keys and values of one attention: ``K' = [P_k; K]``, ``V' = [P_v; V]``.

    rows (2, L, H h) train, or are made by an MLP whose first part (`trunk`) all layers share:
    ``P = up(tanh(W P' + b))``; :meth:`collapse` keeps only its result. frozen: as many of them, the
    first ones, stay as they are (`first`, a buffer). The rows join the keys as
    the attention sees them (behind rotary positions, before heads are repeated), so positions of
    real tokens do not move, a key-value cache does not hold them, and a causal mask lets every
    token see them. dropout acts on the numbers of the rows, for every sample on its own.

    A causal call stays one, without any mask: L queries in front, whose answers are dropped, make
    keys and queries equal in number again, so that query t sees the rows and tokens 0..t.

    Listens to a module that calls ``F.scaled_dot_product_attention`` (or is an
    ``nn.MultiheadAttention``). Raises RecipeError when the run calls neither.
    """

    def __init__(self, state: Any, adapter: str, length: int, width: int,
                 trunk: Trunk | None = None, std: float = 0.02, dropout: float = 0.0,
                 frozen: int = 0):
        super().__init__(state, adapter)
        self.length, self.width, self.dropout = length, width, dropout
        self.trunk, self.frozen = trunk, frozen
        if trunk is None:
            self.rows = nn.Parameter(torch.randn(2, length - frozen, width) * std)
            if frozen:
                self.register_buffer("first", torch.randn(2, frozen, width) * std)
        else:
            self.rows = None
            self.up = nn.Linear(trunk.down.out_features, 2 * width)

    def made(self) -> Tensor:
        """The rows: (2, L, H h)."""
        if self.trunk is None:
            return torch.cat([self.first.to(self.rows), self.rows], 1) if self.frozen else self.rows
        return self.up(self.trunk()).view(self.length, 2, self.width).transpose(0, 1)

    @torch.no_grad()
    def begin(self, rows: Tensor) -> None:
        """Start from these rows, (2, L, H h). Where an MLP makes them its last layer becomes what
        comes nearest to them: it meets them where it is as wide as L - 1 or wider."""
        if self.trunk is None:
            self.rows.copy_(rows[:, self.frozen :])
            if self.frozen:
                self.first.copy_(rows[:, : self.frozen])
            return
        inner = self.trunk().to("cpu", torch.float64)
        wanted = rows.to(inner).transpose(0, 1).reshape(self.length, -1)
        found = torch.linalg.pinv(F.pad(inner, (0, 1), value=1.0)) @ wanted
        self.up.weight.copy_(found[:-1].t())
        self.up.bias.copy_(found[-1])

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: the rows alone, whatever made them."""
        if self.frozen:
            return {"rows": self.rows, "first": self.first}
        return {"rows": self.made().contiguous()}

    @torch.no_grad()
    def collapse(self) -> None:
        """Keep the rows and drop the MLP that made them."""
        if self.trunk is not None:
            rows = nn.Parameter(self.made().contiguous())
            self.trunk = None
            del self.up
            self.rows = rows

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        tape, met = self.state.tape, []

        def join(how: Callable[..., Any]) -> Callable[..., Any]:
            def joined(*given: Any) -> Any:
                met.append(how)
                return how(*given)
            return joined

        with tape.answering({_SDPA: join(self.attend), _MHA: join(self.attend_mha)}):
            out = call(*args, **kw)
        if not met:
            raise RecipeError(f"prefix: {type(module).__name__} computed its attention without "
                              "F.scaled_dot_product_attention; load the model with "
                              "attn_implementation='sdpa'")
        return out

    def attend(self, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        """Attention over ``[P_k; K]`` and ``[P_v; V]``."""
        given = dict(zip(_SDPA_NAMES, args, strict=False)) | kwargs
        k = given["key"]
        return joined(func, given, self._dropped(self.made().to(k.dtype).unsqueeze(1), len(k)),
                      self._wider)

    def _dropped(self, P: Tensor, samples: int) -> Tensor:
        """Rows (2, 1, L, H h), or (2, samples, L, H h) where each sample drops its own."""
        if not (self.dropout and self.training):
            return P
        return dropout(P.expand(-1, samples, -1, -1), self.dropout)

    def _wider(self, mask: Tensor, keys: int) -> Tensor:
        """The mask with L open columns; layers that share a mask share the wider one."""
        box, name = self.here.box, ("prefix", self.adapter)
        had = box.get(name)
        if had is not None and had[0] is mask:
            return had[1]
        wide = opened(mask, keys, self.length)
        box[name] = (mask, wide)
        return wide

    def attend_mha(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The same inside ``nn.MultiheadAttention``, where the rows stand last: as its bias rows
        (beside those of its own), or behind the keys and values of each sample."""
        given = dict(zip(_MHA_NAMES, args, strict=False)) | kwargs
        if given.get("attn_mask") is not None:
            raise RecipeError("prefix: nn.MultiheadAttention with an attention mask cannot take "
                              "more keys than tokens")
        key, own = given["key"], (given["bias_k"], given["bias_v"])
        batch = key.shape[1] if key.dim() == 3 else 1
        P = self._dropped(self.made().to(key.dtype).unsqueeze(1), batch).transpose(1, 2)
        rows = [r if b is None else torch.cat([r, b.expand(-1, r.shape[1], -1)])
                for r, b in zip(P, own, strict=True)]
        apart = rows[0].shape[1] > 1                     # torch repeats its bias rows by itself
        if apart:
            made = (torch.cat([t, r]) for t, r in zip(projected(given), rows, strict=True))
            given |= {name: t.unflatten(-1, (given["num_heads"], -1)).flatten(1, 2).transpose(0, 1)
                      for name, t in zip(("static_k", "static_v"), made, strict=True)}
            rows = [None, None]
        more = self.length + (own[0] is not None) - (not apart)
        given["bias_k"], given["bias_v"] = rows
        if given.get("key_padding_mask") is not None:
            given["key_padding_mask"] = F.pad(given["key_padding_mask"], (0, more))
        return func(**given)


class OwnMass(KeysValues):
    """Rows whose share of attention is one, whatever the tokens take:

        y = (1 - l) Attn(K, V) + softmax(q (s_k P_k)^T) (s_v P_v)

    l the share that the rows take of ``[s_k P_k; K]``; s_k, s_v one number each, which train from 1
    on without weight decay. Written as two attentions: over all keys with values of zero at the
    rows, and over the rows alone. In ``F.scaled_dot_product_attention`` only.
    """

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        self.scales = nn.Parameter(torch.ones(2))
        self.scales.burnish_decay = False             # type: ignore[attr-defined]

    def made(self) -> Tensor:
        return super().made() * self.scales[:, None, None]

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        return {"rows": super().made().contiguous(), "scales": self.scales}

    @torch.no_grad()
    def collapse(self) -> None:
        """Keep the rows, unscaled, and drop the MLP that made them."""
        if self.trunk is not None:
            rows = nn.Parameter(super().made().contiguous())
            self.trunk = None
            del self.up
            self.rows = rows

    def attend(self, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        given = dict(zip(_SDPA_NAMES, args, strict=False)) | kwargs
        q, k, v = (given.pop(n) for n in _SDPA_NAMES[:3])
        P = self._dropped(self.made().to(k.dtype).unsqueeze(1), len(k))
        rows = [as_heads(r, *t.shape[:2], t.shape[-1]) for r, t in zip(P, (k, v), strict=True)]
        mask, causal = given.pop("attn_mask", None), given.pop("is_causal", False)
        alone = func(q, *rows, **given)
        ahead = self.length if causal else 0
        tokens = func(F.pad(q, (0, 0, ahead, 0)), torch.cat([rows[0], k], -2),
                      F.pad(v, (0, 0, self.length, 0)), is_causal=causal,
                      attn_mask=None if mask is None else self._wider(mask, k.shape[-2]), **given)
        return alone + (tokens[..., ahead:, :] if ahead else tokens)


class Moved(Listener):
    """Listens to a stack of blocks: its tokens stand `length` positions further on, as they do
    behind rows that are handed to a model as its key-value cache."""

    def __init__(self, state: Any, adapter: str, length: int):
        super().__init__(state, adapter)
        self.length = length

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw = named(module, args, kw)
        at = kw.get("position_ids")
        if at is None:
            x, past = kw.get("input_ids"), kw.get("past_key_values")
            x = kw["inputs_embeds"] if x is None else x
            first = 0 if past is None else past.get_seq_length()
            at = torch.arange(first, first + x.shape[1], device=x.device).unsqueeze(0)
        kw["position_ids"] = at + self.length
        return call(**kw)


def projected(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Keys and values (T, B, D) of ``F.multi_head_attention_forward``, from its arguments."""
    bias = given["in_proj_bias"]
    biases = (None, None) if bias is None else bias.chunk(3)[1:]
    weights = (given["k_proj_weight"], given["v_proj_weight"]) \
        if given.get("use_separate_proj_weight") else given["in_proj_weight"].chunk(3)[1:]
    k, v = (F.linear(given[n], W, b)
            for n, W, b in zip(("key", "value"), weights, biases, strict=True))
    return k, v


class Seen(TorchFunctionMode):
    """Sees the keys and values of the attentions of a model while it runs.

    widths: path of an attention -> width H h of its keys. Of each the first `length` tokens that
    are no padding are kept, sample by sample.
    """

    def __init__(self, model: nn.Module, widths: Mapping[str, int], length: int):
        super().__init__()
        self.model, self.widths, self.length = model, widths, length
        self.found: dict[str, list[Tensor]] = {path: [] for path in widths}
        self.inside: list[str] = []                  # the attention that runs, outermost first
        self.handles: list[Any] = []

    @property
    def done(self) -> bool:
        """Is there enough of every attention?"""
        return all(self._tokens(path) >= self.length for path in self.found)

    def rows(self, path: str) -> Tensor:
        """(2, L, H h): keys and values. DataError where fewer tokens came by."""
        if (n := self._tokens(path)) < self.length:
            raise DataError(f"the attention {path} was given {n} tokens, where {self.length} rows "
                            "were to start from their keys and values; give data that reach it")
        return torch.cat(self.found[path], 1)

    def _tokens(self, path: str) -> int:
        return sum(t.shape[1] for t in self.found[path])

    def __enter__(self) -> Seen:
        for path in self.widths:
            module = self.model.get_submodule(path)
            self.handles += [
                module.register_forward_pre_hook(lambda *_, p=path: self.inside.append(p)),
                module.register_forward_hook(self._leave, always_call=True)]
        return super().__enter__()

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.inside and func in (_SDPA, _MHA) and self._tokens(self.inside[-1]) < self.length:
            names = _SDPA_NAMES if func is _SDPA else _MHA_NAMES
            self._keep(self.inside[-1], func, dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs)

    def _keep(self, path: str, func: Any, given: Mapping[str, Any]) -> None:
        if func is _SDPA:
            own = self.widths[path] // given["key"].shape[-1]     # the others repeat these
            pair = [t[:, :: t.shape[1] // own].transpose(1, 2).flatten(2)
                    for t in (given["key"], given["value"])]
        else:
            pair = [t.transpose(0, 1) for t in projected(given)]
        valid = None if (mask := context().valid) is None else mask.bool()
        for kv in zip(*(samples(t, valid) for t in pair), strict=True):
            if left := self.length - self._tokens(path):
                self.found[path].append(torch.stack([t[:left].detach() for t in kv]))
