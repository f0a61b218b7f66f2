"""What is put beside a frozen network's own tokens: embeddings, and tokens of a block.

Each class is a module that owns its rows and *listens* to one module of the model: the slot calls
``listener(module, call, *args, **kw)`` around the module's run, so the rows live where they are
used, a checkpointed block sees them as its own parameters, and everything behind the last
listener sees as many tokens as before. A listener does nothing while its adapter is not active.

Letters: B batch, T tokens, L rows added, D width. Keys and values: keys_values.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import call_of
from ...core.errors import RecipeError


def is_active(call: Any, adapter: str, what: str) -> bool:
    """Is the adapter in use? Extra tokens and side networks are used whole or not at all."""
    if call.off:
        return False
    if call.rows is not None:
        if adapter in call.rows:
            raise RecipeError(f"{what} changes every sample of a batch; per-sample adapters cannot "
                              f"hold it: use({adapter!r}) for whole batches")
        return False
    weight = dict(call.active).get(adapter)
    if weight not in (None, 0, 1):
        raise RecipeError(f"{what} of {adapter!r} can be used whole, not at {weight}")
    return bool(weight)


class Listener(nn.Module):
    """A module that wraps another's run while its adapter is active.

    `around(module, call, *args, **kw)` answers for the run; ``call(*args, **kw)`` is the module.
    """

    what = "a prompt"
    #: does the module compute something else with it? One that only decides what is kept, and
    #: when, is no part of the function, so files for others leave it out
    changes = True
    #: does it stand around whatever mode a block runs in, so that backward never runs it again?
    outside = False

    def __init__(self, state: Any, adapter: str):
        super().__init__()
        self.__dict__["state"] = state            # shared by all slots, no part of this module
        self.adapter = adapter

    @property
    def here(self) -> Any:
        """The call under way in this thread (the shared state where the block is used alone)."""
        return call_of(self.state) or self.state

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not is_active(self.here, self.adapter, self.what):
            return call(*args, **kw)
        return self.around(module, call, *args, **kw)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        raise NotImplementedError

    def check(self, call: Any) -> None:
        """Raises RecipeError where adapters are to be used as this one cannot be."""
        is_active(call, self.adapter, self.what)

    def listen(self, slot: Any, key: str) -> None:
        """Move into a slot: it owns this module from now on, and calls it."""
        slot.add(self.adapter, key, self)
        slot.listeners.append(self)


class Fixed(Listener):
    """Listens to the model: while the adapter is in use, the modules in `fixed` run in evaluation
    mode, so that they are one function of their input: no dropout, statistics that do not move.
    """

    def __init__(self, state: Any, adapter: str, fixed: list[nn.Module]):
        super().__init__(state, adapter)
        self.__dict__["fixed"] = fixed           # the model's modules, no children of this one

    def check(self, call: Any) -> None:
        pass                                     # a mode has no scale

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if self.here.off or not dict(self.here.active).get(self.adapter):
            return call(*args, **kw)
        was = [m for m in self.fixed if m.training]
        try:
            for m in was:
                m.training = False
            return call(*args, **kw)
        finally:
            for m in was:
                m.training = True


class Graded(Listener):
    """Listens to a module that a model runs without a graph: where the model was called with one,
    it has one, so that what trains inside is reached."""

    changes = False

    def check(self, call: Any) -> None:
        pass                                     # it changes no number

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        here = self.here
        if here.off or not here.grad or not dict(here.active).get(self.adapter):
            return call(*args, **kw)
        with torch.enable_grad():
            return call(*args, **kw)


def named(module: nn.Module, args: tuple, kw: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of the module by name."""
    own = getattr(type(module), "_burnish_base", type(module)).forward
    names = list(inspect.signature(own).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kw


def accepts(module: nn.Module, *names: str) -> bool:
    """Does the module's forward name all of these?"""
    own = getattr(type(module), "_burnish_base", type(module)).forward
    return set(names) <= set(inspect.signature(own).parameters)


#: what a scan's state says of the tokens it has read
_TOKENS = "burnish_tokens"


# -- embeddings in front of a sequence ------------------------------------------------------------
class Prepended(Listener):
    """``[P; E(x)]``: rows (L, D) before the embeddings of a stack of blocks.

    Listens to the module that embeds and runs the blocks (it takes ``inputs_embeds``). Mask, token
    types and positions grow by L; the result loses its first L states, so labels, poolers and
    heads need no care (``stay=True`` leaves them, in the encoder's states of an encoder-decoder,
    ``encoder_hidden_states`` among them: its decoder reads them, see :class:`Lengthened`).
    Positions count from the first unmasked token, so padding on the left changes nothing. With a
    filled key-value cache the rows are in it already: they are not put in again.

    edit: what is added to the embeddings, by the place of a token in the text. maker: makes P of
    the rows and the edit (generators.py); None: the rows are P.
    """

    def __init__(self, state: Any, adapter: str, rows: Tensor, causal: bool, stay: bool = False,
                 edit: Positioned | None = None, maker: nn.Module | None = None):
        super().__init__(state, adapter)
        self.rows = nn.Parameter(rows)
        self.edit, self.maker = edit, maker
        self.causal, self.stay = causal, stay

    def made(self) -> Tensor:
        """P."""
        return self.rows if self.maker is None else self.maker(self.rows, self.edit)

    def made_for(self, x: Tensor) -> Tensor:
        """P before the embeddings x (B, T, D): (L, D), or (1 or B, L, D)."""
        return self.made()

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: P, whatever made it, and the edit."""
        own = {} if self.edit is None else {f"edit.{n}": t.detach() for n, t in
                                            self.edit.named_parameters()}
        return {"rows": self.made().detach().contiguous(), **own}

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw = named(module, args, kw)
        L, known = len(self.rows), tokens_known(kw)
        text = mask = kw.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise RecipeError("a prompt in front of the tokens needs attention_mask as "
                                  "(batch, tokens); a mask made for this length cannot be extended")
            kw["attention_mask"] = mask = F.pad(mask, (L, 0), value=1)
        at = kw.get("position_ids")
        if known:
            if at is not None:
                kw["position_ids"] = at + L
            if self.edit is not None:
                kw["inputs_embeds"] = self.embedded(module, kw, known - L, text)
                kw["input_ids"] = None
            return _noted(call(**kw), known, kw)
        x = self.embedded(module, kw, 0, text)
        kw["inputs_embeds"] = x = torch.cat([self.made_for(x).to(x.dtype).expand(len(x), -1, -1),
                                              x], 1)
        kw["input_ids"] = None
        if kw.get("token_type_ids") is not None:
            kw["token_type_ids"] = F.pad(kw["token_type_ids"], (L, 0))
        if at is not None:
            first = torch.arange(L, device=x.device).expand(*at.shape[:-1], L)
            kw["position_ids"] = torch.cat([first, at + L], -1)
        elif self.causal and mask is not None and accepts(module, "position_ids"):
            kw["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_(min=0)
        out = _noted(call(**kw), 0, kw)
        return out if self.stay else _shorter(out, L)

    def embedded(self, module: nn.Module, kw: dict[str, Any], first: int, text: Tensor | None
                 ) -> Tensor:
        """E(x), edited: of tokens behind `first` others of the text, whose mask is `text`."""
        x: Tensor | None = kw.get("inputs_embeds")
        if x is None:
            x = module.get_input_embeddings()(kw["input_ids"])
        return x if self.edit is None else x + self.edit(first, x.shape[1], text).to(x.dtype)


class Positioned(nn.Module):
    """Row i of ``A B`` for the i-th token of a text; A (S, R), B (R, D). Tokens of padding have
    none, nor have those behind the S-th."""

    def __init__(self, tokens: int, rank: int, width: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(tokens, rank) * 0.02)
        self.B = nn.Parameter(torch.zeros(rank, width))

    def table(self) -> Tensor:
        """A B, (S, D)."""
        return self.A @ self.B

    def forward(self, first: int, tokens: int, valid: Tensor | None = None) -> Tensor:
        """(tokens, D) or (B, tokens, D): for tokens behind `first` others; valid (B, all of them):
        the mask that says which count."""
        if valid is None:
            some = self.A[first : first + tokens]
            return F.pad(some @ self.B, (0, 0, 0, tokens - len(some)))
        at = (valid.long().cumsum(-1) - 1)[:, -tokens:]
        inside = valid[:, -tokens:].bool() & (at < len(self.A))
        rows = F.embedding(at.clamp(0, len(self.A) - 1), self.A)
        return (rows * inside.unsqueeze(-1)) @ self.B


def tokens_known(kw: dict[str, Any]) -> int:
    """How many tokens, the rows among them, a cache holds already."""
    past, scan = kw.get("past_key_values"), kw.get("cache_params")
    if past is not None:
        return int(past.get_seq_length())
    return getattr(scan, _TOKENS, 0) if scan is not None and scan.has_previous_state() else 0


def _noted(out: Any, known: int, kw: dict[str, Any]) -> Any:
    """The outputs; the state of a scan, which does not count them, is told its tokens."""
    scan = None if isinstance(out, tuple | Tensor) else out.get("cache_params")
    if (scan := kw.get("cache_params") if scan is None else scan) is not None:
        x = kw.get("inputs_embeds")
        setattr(scan, _TOKENS, known + (kw["input_ids"] if x is None else x).shape[1])
    return out


def _shorter(out: Any, L: int) -> Any:
    """A stack's outputs without the states of the first L tokens."""
    if isinstance(out, Tensor):
        return out[:, L:]
    if isinstance(out, tuple):
        return (out[0][:, L:], *out[1:])
    out["last_hidden_state"] = out["last_hidden_state"][:, L:]
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(h[:, L:] for h in out["hidden_states"])
    return out


class Behind(Listener):
    """Listens to a pooler: it reads the states behind the first `length`."""

    def __init__(self, state: Any, adapter: str, length: int):
        super().__init__(state, adapter)
        self.length = length

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        h, *rest = args
        return call(h[:, self.length :], *rest, **kw)


class Lengthened(Listener):
    """Listens to a decoder: the mask of its encoder covers the encoder's extra rows."""

    def __init__(self, state: Any, adapter: str, length: int):
        super().__init__(state, adapter)
        self.length = length

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        kw = named(module, args, kw)
        mask = kw.get("encoder_attention_mask")
        if mask is not None:
            kw["encoder_attention_mask"] = F.pad(mask, (self.length, 0), value=1)
        return call(**kw)


# -- tokens inside a stack of blocks --------------------------------------------------------------
class Tokens(Listener):
    """Rows among the tokens of one block: put in, replaced, carried or taken out.

    rows: (L, D), or None when the block only carries what came before. enter: the block is the
    first, rows are put in behind `after` tokens (None: behind all); else they replace the L that
    are there. leave: the block is the last, the L states are taken out behind it. maker: makes the
    rows, in their place (generators.py). beta: rows that replace are ``beta rows + (1 - beta)
    what is there``. A mask, which is for the tokens without the rows, is made longer
    (:func:`grown`); one of rows behind all is refused unless `grows`.
    """

    def __init__(self, state: Any, adapter: str, length: int, rows: Tensor | None, *,
                 after: int | None, enter: bool, leave: bool, dropout: float = 0.0,
                 maker: nn.Module | None = None, beta: float = 1.0, grows: bool = False):
        super().__init__(state, adapter)
        self.rows = None if rows is None else nn.Parameter(rows)
        self.length, self.after, self.dropout = length, after, dropout
        self.enter, self.leave, self.maker = enter, leave, maker
        self.beta, self.grows = beta, grows

    def made(self) -> Tensor | None:
        """The rows, or None."""
        return self.rows if self.maker is None else self.maker()

    def made_for(self, x: Tensor) -> Tensor | None:
        """The rows beside the tokens x (B, T, D): (L, D), or (B, L, D), or None."""
        return self.made()

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """Its tensors once training is over: the rows, whatever made them."""
        made = self.made()
        return {} if made is None else {"rows": made.detach().contiguous()}

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        given = named(module, args, kw)
        if (mask := given.get("attention_mask")) is not None:
            if not (self.grows or self.after):
                raise RecipeError("tokens put behind all others have no place in an attention "
                                  "mask; vpt serves networks without one where nothing stands "
                                  "before the tokens: use prefix or prompt_tuning here")
            given["attention_mask"] = grown(mask, self.after or 0, self.length)
            args, kw = (), given
        name, x = (None, args[0]) if args else next(iter(kw.items()))
        x = self.put(x)
        out = call(x, *args[1:], **kw) if name is None else call(**{**kw, name: x})
        if not self.leave:
            return out
        if isinstance(out, tuple):
            return (self.take(out[0]), *out[1:])
        return self.take(out)

    def put(self, x: Tensor) -> Tensor:
        """The tokens a block is given."""
        if x.dim() != 3:
            raise RecipeError(f"vpt needs tokens (batch, tokens, width); this block is given "
                              f"{tuple(x.shape)}")
        if (made := self.made_for(x)) is None:
            return x
        rows = made.to(x.dtype).expand(len(x), -1, -1)
        rows = F.dropout(rows, self.dropout, self.training)
        if self.beta != 1 and not self.enter:
            rows = self.beta * rows + (1 - self.beta) * self.rows_in(x)
        if self.after is None:
            return torch.cat([x if self.enter else self.take(x), rows], 1)
        rest = self.after if self.enter else self.after + self.length
        return torch.cat([x[:, : self.after], rows, x[:, rest:]], 1)

    def rows_in(self, x: Tensor) -> Tensor:
        """What stands among the tokens in the place of the rows."""
        first = x.shape[1] - self.length if self.after is None else self.after
        return x[:, first : first + self.length]

    def take(self, x: Tensor) -> Tensor:
        """The tokens of the model, without the rows."""
        return without_rows(x, self.length, self.after)


def without_rows(x: Tensor, length: int, after: int | None) -> Tensor:
    """Tokens without the `length` behind the first `after`, None: the last ones."""
    if after is None:
        return x[:, : x.shape[1] - length]
    return torch.cat([x[:, :after], x[:, after + length :]], 1)


def grown(mask: Tensor, after: int, L: int) -> Tensor:
    """An attention mask of T tokens for T + L, the new ones behind the first `after` (1 or more).

    mask: (B, T), or (..., T or 1, T) that says, or adds, what each token sees. A new token sees
    what the one before them sees, and of the new ones those before it and itself (all of them where
    tokens see what follows); it is seen by whoever sees the one before them.
    """
    a = after - 1
    if mask.dim() == 2:
        return torch.cat([mask[:, :after], mask[:, a : after].expand(-1, L), mask[:, after:]], 1)
    seen = mask[..., a : after].expand(*mask.shape[:-1], L)
    if mask.shape[-2] > 1:
        later = mask[..., a : after, after : after + 1]        # does a token see what follows?
        seen = torch.cat([later.expand(*seen.shape[:-2], after, L), seen[..., after:, :]], -2)
    wide = torch.cat([mask[..., :after], seen, mask[..., after:]], -1)
    if mask.shape[-2] == 1:
        return wide
    itself = mask[..., a : after, a : after].expand(*mask.shape[:-2], L, L)
    upto = torch.ones(L, L, dtype=torch.bool, device=mask.device).tril()
    among = torch.where(upto, itself, later.expand_as(itself))
    own = mask[..., a : after, :].expand(*mask.shape[:-2], L, mask.shape[-1])
    new = torch.cat([own[..., :after], among, own[..., after:]], -1)
    return torch.cat([wide[..., :after, :], new, wide[..., after:, :]], -2)
