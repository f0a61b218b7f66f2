"""A low-rank update of one linear that counts from a place in the text on.

    y_t = s B A drop(x_t)  for t >= the start of the last occurrence of some tokens, else 0

Tokens before it pass as in the base, so that a cache of keys and values which the base has filled
serves. Whoever hears the text (:class:`Invocation`) leaves for the layers how many tokens of each
sample count, from the end, so that rows in front of a text move nothing. Letters: I in, O out, R
rank, B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context, resume
from ...core.errors import RecipeError
from ..state.prompts import Listener, named
from ..tape.executor import checkpoint
from .experts import spread

#: what a cache says of the samples whose tokens count already
_ON = "burnish_invoked"
Rows = tuple[tuple[int, int], ...] | None


def counted(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(B,): how many of the last ids (B, T) stand at or behind the last occurrence of `tokens`."""
    T, n = ids.shape[1], len(tokens)
    if n > T:
        return ids.new_zeros(len(ids))
    wanted = torch.tensor(tokens, device=ids.device)
    here = (ids.unfold(1, n, 1) == wanted).all(-1)               # begins at t
    behind = torch.arange(T, n - 1, -1, device=ids.device)       # tokens from t on
    big = torch.where(here, behind, T + 1).amin(-1)
    return torch.where(big > T, 0, big)


def key_of(adapter: str) -> str:
    """Under which a call holds the counts of an adapter."""
    return f"invoked {adapter}"


def _cache(of: Any) -> Any:
    """The keys and values, or the state of a scan, among arguments or outputs."""
    past = of.get("past_key_values")
    return of.get("cache_params") if past is None else past


def _goes_on(given: Any) -> bool:
    """Does it hold tokens? One that was emptied holds none."""
    past, scan = given.get("past_key_values"), given.get("cache_params")
    return past.get_seq_length() > 0 if past is not None else \
        scan is not None and bool(scan.has_previous_state())


class Invocation(Listener):
    """Listens to a model: finds the tokens in its ids.

    With a cache the samples that counted go on counting, and others begin where this piece of text
    has the tokens. Raises RecipeError for ``inputs_embeds``, in which no token can be found.
    """

    changes = False                              # what it finds acts in the layers

    def __init__(self, state: Any, adapter: str, tokens: tuple[int, ...]):
        super().__init__(state, adapter)
        self.tokens = tokens

    def check(self, call: Any) -> None:
        pass                                     # the layers take any weight, and samples apart

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        here = self.here
        mine = self.adapter in (here.rows or ()) or dict(here.active).get(self.adapter)
        return call(*args, **kw) if here.off or not mine else self.around(module, call, *args, **kw)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = named(module, args, kw)
        if (ids := given.get("input_ids")) is None:
            raise RecipeError("an update that waits for tokens looks for them in input_ids, and "
                              "inputs_embeds has none: give input_ids")
        on, cache = counted(ids, self.tokens), _cache(given)
        before = getattr(cache, _ON, {}).get(self.adapter)
        if before is not None and _goes_on(given):
            if len(on) % len(before):
                raise RecipeError(f"a cache of {len(before)} samples is given {len(on)}")
            before = before.repeat_interleave(len(on) // len(before))    # beams, copies
            on = torch.where((on == 0) & before.to(on.device), ids.shape[1], on)
        own = replace(self.here, given={**self.here.given, key_of(self.adapter): on})
        with resume(own):
            out = call(*args, **kw)
        left = cache if isinstance(out, tuple | Tensor) else _cache(out)
        if left is not None:
            setattr(left, _ON, {**getattr(left, _ON, {}), self.adapter: on > 0})
        return out


class Invoked(nn.Module):
    """A (R, I), B (O, R) zero: nothing at the start. rows: runs of outputs that it adds to where
    the linear is fused."""

    def __init__(self, inp: int, out: int, rank: int, scale: float, dropout: float,
                 rows: Rows = None):
        super().__init__()
        self.key, self.out, self.rows = key_of(""), out, rows
        self.scale, self.dropout = scale, dropout
        n = out if rows is None else sum(b - a for a, b in rows)
        self.A = nn.Parameter(torch.empty(rank, inp))
        nn.init.uniform_(self.A, -1 / math.sqrt(inp), 1 / math.sqrt(inp))
        self.B = nn.Parameter(torch.zeros(n, rank))
        self.A.burnish_decay = self.B.burnish_decay = False

    def attached(self, attacher: Any) -> None:
        """It reads what its own adapter has left."""
        self.key = key_of(attacher.adapter.name)

    def forward(self, x: Tensor) -> Tensor:
        return spread(checkpoint(self, self.run, (x,), {}), self.rows, self.out)

    def run(self, x: Tensor) -> Any:
        """The update itself, (..., T, O) or as many outputs as `rows` say."""
        on, parts = context().by_entry(self.key, x)      # (B, ..., T, I), a flattened batch too
        T = parts.shape[-2]
        p = self.dropout if self.training else 0.0
        z = F.linear(F.dropout(parts, p, p > 0), self.A.to(x.dtype)) * self.scale
        counts = torch.arange(T, device=x.device) >= T - on.view(-1, *[1] * (parts.dim() - 2))
        z = z * counts.unsqueeze(-1).to(z.dtype)
        return F.linear(z, self.B.to(z.dtype)).flatten(0, 1)
