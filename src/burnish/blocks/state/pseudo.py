"""Pseudo-tokens that an encoder makes of each other, in front of a text or inside it.

    P = W_2 ReLU(W_1 [forward; backward] + b_1) + b_2     of a BiLSTM of two layers over Q (L, D)

The encoder knows no input: once training is over P (L, D) is all that is kept. In a text the k-th
placeholder of a sample reads P_k, so that pseudo-tokens stand between its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import RecipeError
from ...core.followed import is_fake
from ..tape.cast import uncast
from .prompts import Listener, named, tokens_known


class Direction(nn.Module):
    """An LSTM over the rows of one sequence, (L, inp) -> (L, out); gates input, forget, cell,
    output, as torch's. Of plain products: the sequence is as long as a prompt."""

    def __init__(self, inp: int, out: int, back: bool):
        super().__init__()
        bound = out ** -0.5
        self.back = back
        self.given = nn.Parameter(torch.empty(4 * out, inp).uniform_(-bound, bound))
        self.state = nn.Parameter(torch.empty(4 * out, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(4 * out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        made = F.linear(x, self.given, self.bias)
        h = c = x.new_zeros(self.state.shape[1])
        found: list[Tensor] = []
        for t in reversed(range(len(x))) if self.back else range(len(x)):
            i, f, g, o = (made[t] + self.state @ h).chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            found.append(h)
        return torch.stack(found[::-1] if self.back else found)


class PromptEncoder(nn.Module):
    """Q (L, D) -> P (L, D), see the module. hidden: width of each direction."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(Direction(inp, hidden, back) for back in (False, True))
            for inp in (width, 2 * hidden))
        self.up, self.out = nn.Linear(2 * hidden, width), nn.Linear(width, width)

    def forward(self, x: Tensor, edit: Any = None) -> Tensor:
        with uncast(x):
            for one, other in self.layers:           # type: ignore[misc]
                x = torch.cat([one(x), other(x)], 1)
            return self.out(torch.relu(self.up(x)))


class Standing(Listener):
    """Listens to an embedding of tokens: the k-th `placeholder` of a sample reads row k.

    rows: (L, D). maker: makes P of them; None: they are P. apart: a sample may have none (a decoder
    reads the same table). So it may behind tokens that are kept from before (see :class:`Spelt`).
    Raises RecipeError for a sample that has not L of them.
    """

    def __init__(self, state: Any, adapter: str, rows: Tensor, maker: nn.Module | None,
                 placeholder: int, apart: bool):
        super().__init__(state, adapter)
        self.rows, self.maker = nn.Parameter(rows), maker
        self.placeholder, self.apart = placeholder, apart

    def made(self) -> Tensor:
        """P."""
        return self.rows if self.maker is None else self.maker(self.rows)

    def goes_on(self) -> bool:
        """Does this call go on behind tokens of a cache, the placeholders among them?"""
        return bool(getattr(self.here, "box", {}).get(("cached", self.adapter)))

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: the rows alone."""
        return {"rows": self.made().detach().contiguous()}

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        ids = args[0] if args else next(iter(kw.values()))
        out, here = call(*args, **kw), ids == self.placeholder
        P = self.made()
        if not is_fake(ids):
            found = {int(n) for n in here.sum(-1).unique()}
            if found == {0} and (self.apart or self.goes_on()):
                return out
            if found != {len(P)}:
                raise RecipeError(f"the pseudo-tokens stand where token {self.placeholder} is: "
                                  f"every sample needs {len(P)} of it, and here they have "
                                  f"{', '.join(map(str, sorted(found)))} (truncation must leave "
                                  "them, and the mask)")
        which = (here.long().cumsum(-1) - 1).clamp(0, len(P) - 1)
        return torch.where(here.unsqueeze(-1), F.embedding(which, P).to(out.dtype), out)


class Spelt(Listener):
    """Listens to a model: it is called with ids, among which placeholders can be found. How many
    tokens its cache knows already is left for :class:`Standing`."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = named(module, args, kw)
        if given.get("inputs_embeds") is not None:
            raise RecipeError("pseudo-tokens stand in the place of tokens in input_ids, and "
                              "inputs_embeds has none: give input_ids")
        self.here.box["cached", self.adapter] = tokens_known(given)
        return call(*args, **kw)
