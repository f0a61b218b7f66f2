"""A second reading of pictures in a model of two towers: the rows that stand among their tokens.

    f_c = P_v n(cls),   f_r = P_r mean_k n(slot_k),   P_r = P_v + D   or   P_v + (A B)^T
    z_c = s cos(f_c, t),   z_r = s cos(f_r, t),       z = a z_c + (1 - a) z_r

n is the tower's last norm, P_v (P, D) its frozen projection, t the features of texts. For a
cross-entropy H with any labels ``a H(z_c) + (1 - a) H(z_r) = H(z) + gap``: what is apart follows no
label (:func:`gap`), so a loss of z is that of both readings once it is added.

Letters: B images, C texts, L rows, D width of the tower, P the width where images and texts meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ..update.precise import widened
from .placed import matched
from .prompts import Listener, named


class Slots(Listener):
    """Listens to what runs the blocks: the L rows behind the first `after` states leave them, and
    wait for the norm. Not the last block's part: run again in backward, it would leave states
    without a graph."""

    def __init__(self, state: Any, adapter: str, length: int, after: int):
        super().__init__(state, adapter)
        self.length, self.after = length, after

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        first = out if isinstance(out, Tensor) else out[0]
        a, b = self.after, self.after + self.length
        self.here.box["slots", self.adapter] = first[:, a:b]
        left = torch.cat([first[:, :a], first[:, b:]], 1)
        if isinstance(out, Tensor):
            return left
        if isinstance(out, tuple):
            return (left, *out[1:])
        out["last_hidden_state"] = left
        return out


class Normed(Listener):
    """Listens to the last norm: the mean of the slots behind it waits for the projection."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        if (slots := self.here.box.pop(("slots", self.adapter), None)) is not None:
            self.here.box["slots mean", self.adapter] = call(slots).mean(1)
        return out


class Second(Listener):
    """Listens to the projection of images: f_r is made beside f_c. rank=0: D (P, D) trains, from
    zero; else A (D, rank) as a matrix from `rank` starts, and B (rank, P), zero."""

    def __init__(self, state: Any, adapter: str, width: int, out: int, rank: int):
        super().__init__(state, adapter)
        self.weight = None if rank else nn.Parameter(torch.zeros(out, width))
        if rank:
            self.A = nn.Parameter(torch.empty(width, rank).uniform_(-1, 1) * rank ** -0.5)
            self.B = nn.Parameter(torch.zeros(rank, out))

    def apart(self) -> Tensor:
        """P_r - P_v."""
        return (self.A @ self.B).t() if self.weight is None else self.weight

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensor once training is over: the difference, whatever made it."""
        return {"weight": self.apart().detach().contiguous()}

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        if (mean := self.here.box.pop(("slots mean", self.adapter), None)) is not None:
            more = F.linear(mean, self.weight.to(mean.dtype)) if self.weight is not None \
                else mean @ self.A.to(mean.dtype) @ self.B.to(mean.dtype)
            self.here.box["second", self.adapter] = call(mean) + more
        return out


class Readings(Listener):
    """Listens to a model of two towers: its logits are z, of both readings. alpha: a; where the
    batch has `unseen`, 1 for the images it marks. scale: name of the parameter log s.

    Its own contrastive loss is of z. said: the gap of the last forward, where anybody minimises.
    """

    def __init__(self, state: Any, adapter: str, alpha: float, scale: str):
        super().__init__(state, adapter)
        self.alpha, self.scale = alpha, scale
        self.__dict__["said"] = None

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw = named(module, args, kw)
        wanted, marked = kw.pop("return_loss", None), "unseen" in context().given
        if wanted and marked:
            raise RecipeError("a contrastive loss pairs every image with every text, and 'unseen' "
                              "says of single images how they are read: leave one of them out")
        out = call(**kw)
        f_r = self.here.box.pop(("second", self.adapter), None)
        if f_r is None:
            raise RecipeError("the second reading of the images has not been made: this model "
                              "does not use its last norm and projection for them")
        t, z_c = out["text_embeds"], out["logits_per_image"]
        s = module.get_parameter(self.scale).exp().to(z_c.device)
        z_r = s * (F.normalize(f_r, dim=-1).to(t.device) @ t.t()).to(z_c.device)
        a: Any = self.alpha
        if marked:
            mark = context().per_row("unseen", z_c).to(z_c.dtype).unsqueeze(1)
            a = mark + (1 - mark) * a
        z = a * z_c + (1 - a) * z_r
        out["logits_per_image"], out["logits_per_text"] = z, z.t()
        if wanted:
            out["loss"] = (matched(z) + matched(z.t())) / 2
        if self.state.riding.on_end is not None and self.state.riding.wanted:
            apart = gap(z_c, z_r, a)
            self.__dict__["said"] = (apart + gap(z_c.t(), z_r.t(), a)) / 2 if wanted else apart
        return out

    def take(self) -> Tensor | None:
        """The gap of the last forward, once."""
        said, self.__dict__["said"] = self.said, None
        return said


def gap(one: Tensor, other: Tensor, a: float | Tensor) -> Tensor:
    """Mean over rows of ``a lse(one) + (1 - a) lse(other) - lse(a one + (1 - a) other)``, lse the
    log of the sum of exponentials over a row: at least 0. a: a number, or (rows, 1)."""
    one, other = widened(one), widened(other)

    def lse(z: Tensor) -> Tensor:
        return z.logsumexp(-1, keepdim=True)

    return (a * lse(one) + (1 - a) * lse(other) - lse(a * one + (1 - a) * other)).mean()
