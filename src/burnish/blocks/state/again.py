"""A frozen attention run again, beside its own run, on other sequences or with copies of its
linears; what it makes there is added behind its last linear.

    own run      x -> q, k, v -> softmax -> ctx -> O ctx + added
    beside it    the same module, its box empty, on x in other groups -> made -> added

Everything that the module does by itself (positions, norms of queries and keys, scales) is done
beside it too. Letters: B rows, T tokens, H heads, D slices, N views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import resume
from ...core.errors import RecipeError
from .attending import SDPA
from .attending import named as by_name
from .prompts import Listener, named

_AGAIN = "again"


@dataclass
class Turn:
    """One run beside: whose, with which copies, and what came out."""

    owner: tuple[str, str]
    name: str
    made: Tensor | None = None


class Again(Listener):
    """Listens to an attention: :meth:`added` is made of runs beside it (:meth:`again`).

    owner: (adapter, method) that :class:`Copied` and :class:`Ended` within it share.
    """

    what = "an attention that runs again"

    def __init__(self, state: Any, owner: tuple[str, str]):
        super().__init__(state, owner[0])
        self.owner = owner

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        box = self.here.box
        if _AGAIN in box:                        # somebody else's run beside
            return call(*args, **kw)
        box[self.owner] = self.added(module, call, named(module, args, kw))
        out = call(*args, **kw)
        if box.pop(self.owner, None) is not None:
            self.unmet(module)
        return out

    def added(self, module: nn.Module, call: Callable[..., Any], kw: dict[str, Any]) -> Tensor:
        """What is added behind the last linear."""
        raise NotImplementedError

    def again(self, module: nn.Module, name: str, call: Callable[..., Any], kw: dict[str, Any],
              **facts: Any) -> Tensor:
        """What the last linear makes in a run beside, `facts` of the call changed."""
        beside, turn = self.here.inner(**facts), Turn(self.owner, name)
        beside.box[_AGAIN] = turn
        with resume(beside):
            call(**kw)
        if turn.made is None:
            self.unmet(module)
        return turn.made

    def unmet(self, module: nn.Module) -> NoReturn:
        raise RecipeError(f"{self.owner[1]}: {type(module).__name__} computes past its own last "
                          "linear; expected one that calls it")

    def samples(self, rows: int, group: int, what: str) -> int:
        """Groups of `group` consecutive samples that the rows are of."""
        n = self.here.samples[0] if self.here.samples else rows
        if n % group or rows % n:
            raise RecipeError(f"{self.owner[1]}: a batch of {n} samples ({rows} rows in an "
                              f"attention) does not fall into {what} of {group}")
        return n // group


class Ended(Listener):
    """Listens to the last linear of an attention: ``y <- y + S(y) + added``; S may be None."""

    what = "an attention that runs again"

    def __init__(self, state: Any, owner: tuple[str, str], inner: nn.Module | None = None):
        super().__init__(state, owner[0])
        self.owner, self.inner = owner, inner

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        box, y = self.here.box, call(*args, **kw)
        turn = box.get(_AGAIN)
        if turn is not None:
            if turn.owner == self.owner:
                turn.made = y
            return y
        added = box.pop(self.owner, None)
        if added is None:
            return y
        return (y if self.inner is None else y + self.inner(y)) + added


class Copied(Listener):
    """Listens to a linear: in the run `name` beside, a copy of it that trains answers.

    W (out, in), bias or None; zero: the copies start at 0 instead. copies.<name>.weight, .bias.
    """

    what = "a copy of a linear"

    def __init__(self, state: Any, owner: tuple[str, str], names: Sequence[str], W: Tensor,
                 bias: Tensor | None, zero: bool = False):
        super().__init__(state, owner[0])
        self.owner = owner
        self.copies = nn.ModuleDict({n: _copy(W, bias, zero) for n in names})

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        turn = self.here.box.get(_AGAIN)
        if turn is None or turn.owner != self.owner:
            return call(*args, **kw)
        x = args[0] if args else next(iter(kw.values()))
        own: Any = self.copies[turn.name]
        return F.linear(x, own.weight.to(x.dtype), None if own.bias is None
                        else own.bias.to(x.dtype))


def _copy(W: Tensor, bias: Tensor | None, zero: bool) -> nn.Linear:
    made = nn.Linear(W.shape[1], W.shape[0], bias is not None, device="meta")
    for name, t in (("weight", W), ("bias", bias)):
        if t is not None:
            t = t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True).contiguous()
            setattr(made, name, nn.Parameter(t.zero_() if zero else t))
    return made


# -- along slices ---------------------------------------------------------------------------------
class Slices(Again):
    """``A(Attn(x of one location in all D slices))``, for every location; A any module.

    Consecutive samples are the D slices of one scan. x (B, T, d), or (B, h, w, d) (whole or in
    windows), is read as sequences of D; of a grid as one of :func:`folded` sides.
    """

    def __init__(self, state: Any, owner: tuple[str, str], slices: int, inner: nn.Module):
        super().__init__(state, owner)
        self.slices, self.inner = slices, inner

    def added(self, module: nn.Module, call: Callable[..., Any], kw: dict[str, Any]) -> Tensor:
        first, x = next(iter(kw.items()))
        rest = {k: v for k, v in kw.items() if k not in (first, "attention_mask")}
        given = [k for k, v in rest.items() if isinstance(v, Tensor | tuple | list)]
        if given:
            raise RecipeError(f"{self.owner[1]}: {type(module).__name__} is given {given[0]}, made "
                              "for its tokens, and cannot attend along slices")
        b, D = self.samples(len(x), self.slices, "scans"), self.slices
        u = x.reshape(b, D, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        rows = len(u)
        if x.dim() == 4:
            u = u.unflatten(1, folded(D))
        try:
            y = self.again(module, "", call, {first: u, **rest}, valid=None, given={},
                           samples=(rows,))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as e:
            raise RecipeError(f"{self.owner[1]}: {type(module).__name__} cannot attend over {D} "
                              f"tokens in the place of {x.shape[1:-1].numel()}: {e}") from e
        y = y.reshape(rows, D, -1).unflatten(0, (b, -1)).transpose(1, 2)
        made: Tensor = self.inner(y.reshape(*x.shape[:-1], y.shape[-1]))
        return made


def folded(n: int) -> tuple[int, int]:
    """(h, w), h w = n, h the largest factor not above the root."""
    h = next(k for k in range(math.isqrt(n), 0, -1) if not n % k)
    return h, n // h


# -- across views ---------------------------------------------------------------------------------
class Views(Again):
    """The attention with copies of its linears, across the N views of an object and, `reference`,
    from each of them to a picture that goes before: consecutive samples are [reference,] views.

    attend: "full", or "rows" (tokens of the same row of a square picture). What a key's mask says
    is what a token at the query's place would be told in the key's own picture. The reference is
    given nothing, so its states are the frozen model's.
    """

    def __init__(self, state: Any, owner: tuple[str, str], views: int, reference: bool,
                 attend: str):
        super().__init__(state, owner)
        self.views, self.reference, self.rows = views, reference, attend == "rows"

    def added(self, module: nn.Module, call: Callable[..., Any], kw: dict[str, Any]) -> Tensor:
        made = self.across(module, "views", call, kw)
        return made + self.across(module, "reference", call, kw) if self.reference else made

    def across(self, module: nn.Module, name: str, call: Callable[..., Any], kw: dict[str, Any]
               ) -> Tensor:
        met, state = [], self.__dict__["state"]

        def attend(func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
            met.append(func)
            return self.attend(name, func, by_name(args, kwargs))

        with state.tape.answering({SDPA: attend}):
            made = self.again(module, name, call, kw)
        if not met:
            raise RecipeError(f"{self.owner[1]}: {type(module).__name__} computed its attention "
                              "without F.scaled_dot_product_attention; load the model with "
                              "attn_implementation='sdpa'")
        if not self.reference:
            return made
        b = self.samples(len(made), self.views + 1, "groups")
        counts = torch.ones(self.views + 1, device=made.device, dtype=made.dtype)
        counts[0] = 0                            # biases reach the reference too
        counts = counts.repeat(b).repeat_interleave(len(made) // counts.numel() // b)
        return made * counts.view(-1, *[1] * (made.dim() - 1))

    def attend(self, name: str, func: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        q, k, v = (given.pop(n) for n in ("query", "key", "value"))
        T, mask = q.shape[-2], given.pop("attn_mask", None)
        if given.get("is_causal") or q.dim() != 4 or k.shape[-2] != T:
            raise RecipeError(f"{self.owner[1]}: expected self-attention of (batch, heads, tokens, "
                              "width) in which every token sees all")
        group, skip = self.views + self.reference, int(self.reference)
        b = self.samples(len(q), group, "groups")
        apart = (b, group, -1)
        if mask is not None:
            mask = mask.expand(len(q), -1, T, T).unflatten(0, apart)
        q, k, v = (t.unflatten(0, apart) for t in (q, k, v))      # (b, group, M, H, T, h)
        side = self.side(T) if self.rows and name == "views" else None
        if name == "views":
            k, v = (_joined(t[:, skip:], side) for t in (k, v))
            mask = None if mask is None else _joined_mask(mask[:, skip:], side)
        else:
            k, v = (t[:, 0].flatten(0, 1) for t in (k, v))
            mask = None if mask is None else mask[:, 0].flatten(0, 1).repeat(1, 1, self.views, 1)
        y = func(_joined(q[:, skip:], side), k, v, attn_mask=mask, **given)
        y = _parted(y, b, self.views, side)
        return F.pad(y, (0,) * 8 + (skip, 0)).flatten(0, 2)

    def side(self, T: int) -> int:
        side = math.isqrt(T)
        if side * side != T:
            raise RecipeError(f"{self.owner[1]}(attend='rows') needs the tokens of a square "
                              f"picture, and {T} are none; expected attend='full'")
        return side


def _joined(t: Tensor, side: int | None) -> Tensor:
    """(b, N, M, H, T, h) as (b M, H, N T, h), or row by row as (b M side, H, N side, h)."""
    if side is None:
        return t.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(0, 1)
    t = t.unflatten(4, (side, side))             # b N M H r c h
    return t.permute(0, 2, 4, 3, 1, 5, 6).flatten(4, 5).flatten(0, 2)


def _joined_mask(m: Tensor, side: int | None) -> Tensor:
    """(b, N, M, H or 1, T, T) for the same: a key of view j is masked as its own view says."""
    N = m.shape[1]
    if side is None:
        m = m.permute(0, 2, 3, 4, 1, 5).flatten(4, 5).flatten(0, 1)     # b M, H, t, N s
    else:
        m = m.unflatten(5, (side, side)).unflatten(4, (side, side))     # b N M H r c r' c'
        m = m.diagonal(dim1=4, dim2=6)                                  # b N M H c c' r
        m = m.permute(0, 2, 6, 3, 4, 1, 5).flatten(5, 6).flatten(0, 2)
    return m.repeat(1, 1, N, 1)


def _parted(y: Tensor, b: int, N: int, side: int | None) -> Tensor:
    """What :func:`_joined` was given, (b, N, M, H, T, h)."""
    if side is None:
        return y.unflatten(2, (N, -1)).unflatten(0, (b, -1)).permute(0, 3, 1, 2, 4, 5)
    y = y.unflatten(2, (N, side)).unflatten(0, (b, -1, side))           # b M r H N c h
    return y.permute(0, 4, 1, 3, 2, 5, 6).flatten(4, 5)


class Told(Listener):
    """Listens to the first block: a map of each view, (B, C, height, width) under a key of the
    batch, is added to its tokens.

        x <- x + P(pool(silu(conv_2(silu(conv_1(map))))))

    convs 3 x 3, C to width to width, the second of stride 2; pool: means over the squares that the
    tokens are of; x may be (B, d, height, width) too. Tokens that are of no square (of classes) are
    the first, and are told nothing. P starts at 0. group: samples of which the first, the
    reference, is told nothing; 0: all are.
    """

    what = "a map of a view"

    def __init__(self, state: Any, adapter: str, key: str, channels: int, width: int, d: int,
                 group: int):
        super().__init__(state, adapter)
        self.key, self.group = key, group
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.out = nn.Linear(width, d)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        name, x = (None, args[0]) if args else next(iter(kw.items()))
        made = x + self.tokens(x)
        return call(made, *args[1:], **kw) if name is None else call(**{**kw, name: made})

    def tokens(self, x: Tensor) -> Tensor:
        maps, _ = self.here.by_entry(self.key, x, 3)
        if x.dim() not in (3, 4) or maps.dim() != 4 or maps.shape[1] != self.conv1.in_channels:
            raise RecipeError(f"{self.key!r} of the batch is {tuple(maps.shape)}; expected a map "
                              f"of {self.conv1.in_channels} channels for each sample, and blocks "
                              "that are given (batch, tokens, width) or (batch, channels, height, "
                              f"width), not {tuple(x.shape)}")
        flat = x.dim() == 3
        side = [math.isqrt(x.shape[1])] * 2 if flat else x.shape[2:]
        w = self.conv1.weight
        z = F.silu(self.conv2(F.silu(self.conv1(maps.to(w.dtype)))))
        z = F.adaptive_avg_pool2d(z, side).flatten(2).mT
        y = self.out(z)
        if self.group:
            y = y * (torch.arange(len(y), device=y.device) % self.group > 0).view(-1, 1, 1)
        y = F.pad(y, (0, 0, x.shape[1] - y.shape[1], 0)) if flat else y.mT.unflatten(2, side)
        y = y.to(x.dtype)
        return y.repeat_interleave(len(x) // len(y), 0)
