"""Rows in the place of some of a text's tokens: its length, its masks and its end stay as they are.

A text brings placeholders where the rows stand, behind `after` tokens. Any token will do that does
not end a text: where that is, is read off the ids.

Letters: B texts, L rows, D width; C classes, each of which has a text; I images, P the width in
which images and texts meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import context
from ...core.errors import RecipeError
from ...core.followed import is_fake
from ..tape.replay import dropout
from .prompts import Listener, named


class Placed(Listener):
    """Listens to a table of embeddings, or (``entering=True``) to a block: of what the table
    returns, or the block is given, the tokens from `after` on are the rows.

    rows (L, D), or (C, L, D): each text of C has its own. meta: what is added to them for an image
    (:class:`PerImage` is needed then). maker: makes the rows, in their place (generators.py).
    """

    def __init__(self, state: Any, adapter: str, rows: Tensor | None, *, after: int = 1,
                 entering: bool = False, meta: nn.Module | None = None,
                 maker: nn.Module | None = None):
        super().__init__(state, adapter)
        self.rows = None if rows is None else nn.Parameter(rows)
        self.meta, self.maker = meta, maker
        self.after, self.entering = after, entering

    def made(self) -> Tensor:
        """The rows."""
        return self.rows if self.maker is None else self.maker()

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: the rows, whatever made them, and what is added."""
        own = {} if self.meta is None else {f"meta.{n}": t.detach() for n, t in
                                            self.meta.named_parameters()}
        return {"rows": self.made().detach().contiguous(), **own}

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not self.entering:
            ids = args[0] if args else next(iter(kw.values()))
            return self.put(call(*args, **kw), ids)
        if args:
            return call(self.put(args[0]), *args[1:], **kw)
        name, x = next(iter(kw.items()))
        return call(**{**kw, name: self.put(x)})

    def put(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """The tokens, with these `ids`, with the rows in their place."""
        rows, a = self.made(), self.after
        L = rows.shape[-2]
        if x.dim() != 3 or x.shape[1] <= a + L:
            raise RecipeError(f"{L} rows stand in the place of the tokens {a} to {a + L - 1} of a "
                              f"text, and this one is {tuple(x.shape[:-1])}: write as many "
                              "placeholders before the name of the class")
        if ids is not None:
            self.look(ids, a, L)
        return torch.cat([x[:, :a], self.given(rows, len(x)).to(x.dtype), x[:, a + L :]], 1)

    def look(self, ids: Tensor, a: int, L: int) -> None:
        """RecipeError where the rows stand on what is masked, or on words of the texts' own."""
        if is_fake(ids):
            return
        place = ids[:, a : a + L]
        if not bool((place == place[:1]).all()):
            raise RecipeError(f"{L} rows stand in the place of the tokens {a} to {a + L - 1}, and "
                              "these are not the same in all texts, so that words of their own "
                              f"would be lost: write {L} placeholders before the name of each "
                              "class (any words, the same in every text)")
        valid = context().valid
        if valid is not None and valid.shape[1] == ids.shape[1] \
                and not bool(valid[:, a : a + L].all()):
            raise RecipeError(f"{L} rows stand in the place of the tokens {a} to {a + L - 1}, and "
                              "attention_mask is 0 there: pad texts on the right, behind as many "
                              "placeholders")

    def given(self, rows: Tensor, texts: int) -> Tensor:
        """The rows of so many texts, (texts, L, D): image by image, class by class."""
        own, classes = rows.dim() == 3, len(rows)
        if self.meta is None:
            rows = rows if own else rows.expand(texts, -1, -1)
        else:
            if (seen := self.here.box.get(("image", self.adapter))) is None:
                raise RecipeError("these rows follow an image, and none has been seen before the "
                                  "text: call the model with both")
            shift = self.meta(seen)
            rows = rows + shift.view(len(shift), *[1] * (rows.dim() - 1), -1)
            rows = rows.flatten(0, 1) if own else rows.repeat_interleave(texts // len(shift), 0)
        if len(rows) != texts:
            raise RecipeError(f"{classes} classes have rows of their own, and other texts "
                              "are given: one of each class, in their order")
        return rows


class Words(Listener):
    """Listens to a table of embeddings: of the tokens `ids` it returns other rows, wherever they
    stand. rows (n, D) train; dropout acts on their numbers, once for a call, so that a word is the
    same in all texts.
    """

    def __init__(self, state: Any, adapter: str, ids: Sequence[int], rows: Tensor,
                 dropout: float = 0.0):
        super().__init__(state, adapter)
        self.rows, self.dropout = nn.Parameter(rows), dropout
        self.rows.burnish_decay = False              # type: ignore[attr-defined]
        order = torch.tensor(ids).sort()
        self.register_buffer("sorted", order.values, persistent=False)
        self.register_buffer("order", order.indices, persistent=False)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        ids: Tensor = args[0] if args else next(iter(kw.values()))
        x: Tensor = call(*args, **kw)
        at = torch.searchsorted(self.sorted, ids.contiguous()).clamp_(max=len(self.sorted) - 1)
        rows = dropout(self.rows, self.dropout) if self.dropout and self.training else self.rows
        mine = F.embedding(self.order[at], rows).to(x.dtype)
        return torch.where((self.sorted[at] == ids).unsqueeze(-1), mine, x)


class Meta(nn.Module):
    """``W_2 relu(W_1 x + b_1) + b_2`` of normalised image features x (I, P)."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.down.weight.dtype)
        y: Tensor = self.up(F.relu(self.down(x)))
        return y


class Image(Listener):
    """Listens to what projects images into the common width: its normalised answer waits for the
    texts of this call."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out: Tensor = call(*args, **kw)
        self.here.box["image", self.adapter] = F.normalize(out, dim=-1)
        return out


class PerImage(Listener):
    """Listens to a model of two towers: every image reads texts of its own, C for each of I, so
    ``logits_per_image[i, c]`` is of image i and of the text that c has for it."""

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw = named(module, args, kw)
        ids, images = kw.get("input_ids"), kw.get("pixel_values")
        if ids is None or images is None:
            raise RecipeError("texts that follow an image need both: input_ids and pixel_values")
        n, wanted = len(images), kw.pop("return_loss", None)
        for name in ("input_ids", "attention_mask", "position_ids"):
            if kw.get(name) is not None and len(kw[name]) == len(ids):
                kw[name] = kw[name].repeat(n, *[1] * (kw[name].dim() - 1))
        out = call(**kw)
        self.here.box.pop(("image", self.adapter), None)
        texts = out["logits_per_text"]                           # (I C, I)
        mine = torch.arange(n, device=texts.device)
        per = texts.unflatten(0, (n, -1))[mine, :, mine]         # (I, C)
        out["logits_per_image"], out["logits_per_text"] = per, per.t()
        if wanted:
            out["loss"] = (matched(per) + matched(per.t())) / 2
        return out


def matched(logits: Tensor) -> Tensor:
    """The cross-entropy where row i belongs to column i."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class ByTask(Listener):
    """Listens to a model of two towers whose texts are the classes of several tasks, one task after
    the other: of an image's logits those of its own task's classes are left.

    classes: how many each task has. The batch names the ``task`` of every image.
    """

    def __init__(self, state: Any, adapter: str, classes: Sequence[int]):
        super().__init__(state, adapter)
        owner = torch.arange(len(classes)).repeat_interleave(torch.tensor(list(classes)))
        self.register_buffer("owner", owner, persistent=False)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw = named(module, args, kw)
        if kw.get("return_loss"):
            raise RecipeError("a contrastive loss pairs texts and images, and these texts are "
                              "classes of tasks: give tuned.step(..., loss=) one of "
                              "logits_per_image")
        out = call(**kw)
        logits = out["logits_per_image"]
        if logits.shape[1] != len(self.owner):
            raise RecipeError(f"the tasks have {len(self.owner)} classes together, and "
                              f"{logits.shape[1]} texts are given")
        task = context().per_row("task", logits)
        logits = logits.masked_fill(self.owner != task.unsqueeze(1), -torch.inf)
        out["logits_per_image"], out["logits_per_text"] = logits, logits.t()
        return out
