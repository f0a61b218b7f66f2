"""A context as weights: its keys and values, folded into a state a chunk at a time, and a low-rank
change of some matrices, made of the state.

    U_j = softmax(Q K_j^T / sqrt(d)) V_j              K_j, V_j (c, d): what chunk j has left
    S_j = G_j * S_{j-1} + U_j,    G_j = sigmoid(U_j w_g), a number a row, S_0 = 0
    dW = P_out S^T P_in              Q, S (rank, d), P_out (out, d), P_in (rank, in)

See ``methods/lifecycle/streamadapter.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckError, ConfigError, DataError
from ...core.site import Place
from ..state.taps import evaluating
from .adapting import asking
from .edited import Edit


class Layer(nn.Module):
    """What folds one layer's keys and values, and makes changes of its matrices."""

    def __init__(self, places: Sequence[Place], keys: int, values: int, rank: int,
                 generator: torch.Generator, like: Tensor):
        super().__init__()

        def made(t: Tensor) -> nn.Parameter:
            return nn.Parameter(t.to(like.device, like.dtype))

        self.Q = made(torch.randn(rank, keys, generator=generator))
        self.gate = made(torch.zeros(values))
        self.into = nn.ParameterList(made((2 * torch.rand(rank, p.inp, generator=generator) - 1)
                                          * p.inp**-0.5) for p in places)
        self.out = nn.ParameterList(made(torch.zeros(p.out, values)) for p in places)
        self.names = [p.name for p in places]

    def fold(self, S: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """S after a chunk: K (c, keys), V (c, values)."""
        U = (self.Q @ K.T / K.shape[-1]**0.5).softmax(-1) @ V
        return (U @ self.gate).sigmoid().unsqueeze(-1) * S + U

    def changes(self, S: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (left (rank, out), right (rank, in)) of ``dW = left^T right``."""
        return {n: (S @ o.T, i) for n, o, i in zip(self.names, self.out, self.into, strict=True)}


@dataclass(frozen=True)
class Context:
    """What has been absorbed. states: a layer's S (rank, values).  tokens: how many.  cache: keys
    and values of all of them, for a context that goes on; :meth:`closed` drops it."""

    states: tuple[Tensor, ...]
    tokens: int = 0
    cache: Any = field(default=None, repr=False)

    def closed(self) -> Context:
        return Context(self.states, self.tokens)


class Absorber:
    """A causal language model and what folds its contexts; ``layers`` has all that trains."""

    def __init__(self, who: str, model: nn.Module, places: Sequence[Place], rank: int, chunk: int,
                 seed: int):
        self.who, self.model, self.chunk, self.rank = who, model, chunk, rank
        self.places = {p.name: p for p in places}
        first = next(model.parameters())
        self.device = first.device
        seen = self._keys_values(torch.zeros(1, 1, dtype=torch.long, device=self.device), None)[0]
        blocks: dict[int, list[Place]] = {}
        for p in places:
            if p.block is None:
                raise ConfigError(f"{who}: {p.name} is in no layer, so no keys and values are its "
                                  "own; name others by targets")
            blocks.setdefault(p.block, []).append(p)
        if max(blocks) >= len(seen):
            raise ConfigError(f"{who}: this model has {len(seen)} layers with keys and values, and "
                              f"{blocks[max(blocks)][0].name} is in none of them")
        self.of = sorted(blocks)
        draw = torch.Generator().manual_seed(seed)
        like = torch.empty(0, device=self.device,
                           dtype=torch.promote_types(first.dtype, torch.float32))
        self.layers = nn.ModuleList(Layer(blocks[b], seen[b][0].shape[-1], seen[b][1].shape[-1],
                                          rank, draw, like) for b in self.of)

    # -- a context ------------------------------------------------------------------------------
    def empty(self) -> Context:
        """No context: the model as it is."""
        return Context(tuple(layer.gate.new_zeros(self.rank, len(layer.gate))      # type: ignore
                             for layer in self.layers))

    def absorb(self, tokens: Tensor, after: Context | None = None) -> Context:
        """The context with these tokens (1, length) after those of another. A piece that is not the
        last has whole chunks."""
        before = self.empty() if after is None else after
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or len(tokens) != 1:
            raise DataError(f"{self.who} absorbs one context at a time, (1, length) token ids")
        if not tokens.shape[1]:
            return before
        if before.tokens and (before.cache is None or before.tokens % self.chunk):
            raise DataError(f"{self.who}: a context goes on where a chunk of {self.chunk} tokens "
                            f"has ended and is not closed; this one has {before.tokens}"
                            + (", closed" if before.cache is None else ""))
        found, cache = self._keys_values(tokens.to(self.device), before.cache)
        states = []
        for b, layer, S in zip(self.of, self.layers, before.states, strict=True):
            K, V = (t[before.tokens:].to(S.dtype) for t in found[b])
            for i in range(0, len(K), self.chunk):
                S = layer.fold(S, K[i:i + self.chunk], V[i:i + self.chunk])  # type: ignore
            states.append(S)
        return Context(tuple(states), before.tokens + tokens.shape[1], cache)

    @torch.no_grad()
    def _keys_values(self, tokens: Tensor, cache: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
        """Of each layer all keys and values (tokens, heads x width) there are, and the cache."""
        more = {} if cache is None else {"past_key_values": copy.deepcopy(cache)}
        with evaluating([m for m in self.model.modules() if m.training]):
            out = self.model(input_ids=tokens, use_cache=True, **more)
        held = getattr(getattr(out, "past_key_values", None), "layers", None)
        flat = []
        for one in held or ():
            K, V = getattr(one, "keys", None), getattr(one, "values", None)
            if not isinstance(K, Tensor) or not isinstance(V, Tensor) or K.dim() != 4:
                held = None
                break
            flat.append(tuple(t[0].transpose(0, 1).flatten(1) for t in (K, V)))
        if not held:
            raise ConfigError(f"{self.who} folds keys and values of every layer, and a "
                              f"{type(self.model).__name__} leaves none: a causal language model "
                              "of transformers whose layers all attend")
        return flat, out.past_key_values

    # -- a model with one ------------------------------------------------------------------------
    def edit(self, context: Context) -> Edit:
        """The change: ``with absorber.edit(context).standing(): ...``, or ``.merge()``."""
        changes: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, S in zip(self.layers, context.states, strict=True):
            changes |= layer.changes(S)                                      # type: ignore
        return Edit(self.model, self.places, changes)

    def learn(self, lessons: Iterable[Any], rate: float) -> list[float]:
        """A step of AdamW for every lesson (context token ids, query with labels); the losses."""
        params = list(self.layers.parameters())
        optimizer, told = torch.optim.AdamW(params, rate, weight_decay=0.0), []
        for lesson in lessons:
            if not isinstance(lesson, tuple | list) or len(lesson) != 2 or \
                    not isinstance(lesson[1], Mapping) or "labels" not in lesson[1]:
                raise DataError(f"{self.who}: a lesson is (token ids of the context, query), the "
                                "query a mapping with labels")
            optimizer.zero_grad()
            with torch.enable_grad(), asking(self.model, ()), \
                    evaluating([m for m in self.model.modules() if m.training]):
                with self.edit(self.absorb(lesson[0])).standing():
                    loss = self.model(**lesson[1]).loss
                loss.backward()
            if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in params):
                raise CheckError(f"{self.who}: the gradient of a lesson is not finite")
            optimizer.step()
            told.append(float(loss.detach()))
        optimizer.zero_grad()
        return told
