"""Examples in front of a text whose embeddings may move a little, and no further.

    [e(c) + m d; E(x)]    c (L,) tokens of the context, d (L, D), m zero where nothing may move
    after each step       d_i <- d_i min(1, r_i / ||d_i||)

At d = 0 the model reads the examples as it would read their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.outputs import base_class
from .prompts import Prepended


@dataclass(frozen=True)
class Types:
    """What each token of a context is: 0 free text; else t mod 4: 1 template of the input, 2 input,
    3 template of the label, 0 label. A first token has nothing before it to say it."""

    codes: tuple[int, ...]

    def radii(self, inputs: float, templates: float) -> list[float]:
        """How far each may move."""
        return [0.0 if t % 4 == 0 else inputs if t % 4 == 2 else templates for t in self.codes]

    @property
    def labels(self) -> list[int]:
        """Where the answers stand."""
        return [i for i, t in enumerate(self.codes) if i and t and t % 4 == 0]

    def weights(self, decay: float) -> list[float]:
        """Of each of them: ``decay^j``, j = 1 for the label of the largest code."""
        ranks = sorted({self.codes[i] for i in self.labels}, reverse=True)
        return [decay ** (1 + ranks.index(self.codes[i])) for i in self.labels]


class Examples(Prepended):
    """Listens to the module that embeds and runs the blocks; see :class:`Prepended`.

    ids: tokens of the context. radii: r_i of each, 0 where nothing moves. labels: positions in the
    context that are answers; while a term is wanted, what the blocks say before each of them is
    left in `said` (one sample's: no later token has a say in it).
    """

    def __init__(self, state: Any, adapter: str, ids: Sequence[int], radii: Sequence[float],
                 embed: nn.Module, labels: Sequence[int]):
        table: Any = embed.weight
        super().__init__(state, adapter, torch.zeros(len(ids), table.shape[1], device=table.device),
                         causal=True)
        self.__dict__["embed"] = embed               # the model's own, no child of this one
        self.rows.burnish_decay = False              # it would pull to the plain examples
        self.ids, self.radii, self.labels = tuple(ids), tuple(radii), tuple(labels)
        self.__dict__["said"] = None                 # of the forward under way

    def plain(self) -> Tensor:
        """``e(c)``."""
        return self.embed(torch.tensor(self.ids, device=self.rows.device))

    def made(self) -> Tensor:
        """``e(c) + m d``."""
        e = self.plain()
        free = torch.tensor(self.radii, device=self.rows.device).unsqueeze(1) > 0
        return e + (self.rows * free).to(e.dtype)

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: d; the tokens are settings."""
        return {"rows": self.rows.detach()}

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not self.labels or not self.state.riding.wanted:
            return super().around(module, call, *args, **kw)

        def heard(*args: Any, **kw: Any) -> Any:
            out = call(*args, **kw)
            h = out if isinstance(out, Tensor) else out[0]
            if h.shape[1] > len(self.ids):           # else a step of generation
                before = torch.tensor(self.labels, device=h.device) - 1
                self.__dict__["said"] = h[:1].index_select(1, before), type(out)
            return out

        return super().around(module, heard, *args, **kw)

    def take(self, model: nn.Module, path: str) -> Tensor | None:
        """The logits of `model`, whose stack at `path` this listens to, before each label of the
        context, (labels, V), once. Its own forward makes them of what was heard, with all that it
        does to states and logits behind its blocks (scales, soft caps)."""
        said, self.__dict__["said"] = self.said, None
        if said is None:
            return None
        states, kind = said
        out = states if kind is Tensor else (states,) if kind is tuple \
            else kind(last_hidden_state=states)
        stack = model.get_submodule(path)
        stack.forward = lambda *_, **__: out         # an attribute of this one, not of its class
        try:
            answer = base_class(model).forward(model, inputs_embeds=states)
        finally:
            del stack.forward
        logits: Tensor = answer if isinstance(answer, Tensor) else answer[0]
        return logits[0]

    @torch.no_grad()
    def project(self) -> None:
        """Every row back to where it may be."""
        radii = self.rows.new_tensor(self.radii)
        norms = self.rows.norm(dim=1)
        self.rows.mul_((radii / norms.clamp_min(1e-30)).clamp(max=1.0).unsqueeze(1))


def of_all(logits: Tensor, rows: Examples, weights: Sequence[float], loss: Tensor, labels: Tensor,
           items: Any = None) -> Tensor:
    """What makes `loss`, a mean over the labels of the queries, the mean over all labels there are.

    logits: before each label of the context, once; every query has read them, and weighs them with
    `weights`. items: what the loss is a sum divided by, where that is not the number of its labels.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    ids = torch.tensor([rows.ids[i] for i in rows.labels], device=logits.device)
    each = F.cross_entropy(logits.to(wide), ids, reduction="none")
    own = (labels[:, 1:] != -100).sum().clamp_min(1)
    if items is not None:
        loss = loss * (items / own)                  # a mean again: the term is given its share
    return len(labels) * ((each * each.new_tensor(weights)).sum() - len(ids) * loss) / (
        own + len(labels) * len(ids))


class Projecting:
    """A handler: what is projected after each update."""

    def __init__(self, rows: Sequence[Examples]):
        self.rows = rows

    def after_update(self, step: int) -> None:
        for r in self.rows:
            r.project()
