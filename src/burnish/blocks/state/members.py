"""k implicit networks in one: members that share their matrices and are answered side by side.

    l_i(x) = s_i * W (r_i * x) + b_i = (W . s_i r_i^T) x + b_i        i = 1..k

A sample is k rows, one after the other, from the model's input to its answer; row i of them is
member i's. The matrices see k times the rows, and stand once.

Letters: N samples, k members, I in, O out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.batches import repeated
from ...core.errors import RecipeError
from .prompts import Listener

Start = Literal["signs", "normal", "ones"]


def by_member(x: Tensor, k: int) -> Tensor:
    """(N k, ...) as (N, k, ...)."""
    if len(x) % k:
        raise RecipeError(f"a layer is given {len(x)} rows, which are no {k} members of each "
                          "sample: call the model as a whole")
    return x.unflatten(0, (-1, k))


def wide(t: Tensor) -> Tensor:
    """In fp32 or wider, as what trains is held."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _rows(t: Tensor, like: Tensor) -> Tensor:
    """(k, C) to stand beside (N, k, ..., C)."""
    return t.to(like.dtype).view(len(t), *(1,) * (like.dim() - 3), t.shape[1])


def multipliers(k: int, width: int, start: Start, block: int) -> Tensor:
    """(k, width): signs, normal numbers or ones; `block` neighbours have one draw."""
    if start == "ones":
        return torch.ones(k, width)
    if width % block:
        raise RecipeError(f"runs of block={block} inputs do not divide the {width} of the first "
                          "linear")
    drawn = torch.randn(k, width // block)
    return (drawn.sign() if start == "signs" else drawn).repeat_interleave(block, 1)


class Shared(Listener):
    """Listens to a linear that all members share: r (k, I), s (k, O), b (k, O), any of them None.

    b begins as the linear's own bias, for every member, and stands in its place.
    """

    what = "an ensemble"

    def __init__(self, state: Any, adapter: str, r: Tensor | None, s: Tensor | None,
                 b: Tensor | None):
        super().__init__(state, adapter)
        self.r, self.s, self.b = (None if t is None else nn.Parameter(wide(t)) for t in (r, s, b))
        for p in self.parameters():
            p.burnish_decay = False                  # it would pull scales to zero

    def around(self, module: nn.Module, call: Callable[..., Any], x: Tensor, *args: Any,
               **kw: Any) -> Any:
        k = len(next(self.parameters()))
        if self.r is not None:
            x = by_member(x, k)
            x = (x * _rows(self.r, x)).flatten(0, 1)
        y = call(x, *args, **kw)
        if self.s is None:
            return y
        y = by_member(y, k)
        if self.b is None:
            return (y * _rows(self.s, y)).flatten(0, 1)
        rest = self.b - self.s * module.bias         # s (y - bias) + b
        return torch.addcmul(_rows(rest, y), y, _rows(self.s, y)).flatten(0, 1)

    @torch.no_grad()
    def member(self, i: int, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(weight (O, I), bias) of one member by itself."""
        W = W if self.r is None else W * self.r[i]
        W = W if self.s is None else W * self.s[i].unsqueeze(1)
        return W, bias if self.b is None else self.b[i].clone()


class Apart(Listener):
    """Listens to a linear in whose place every member has its own: weight (k, O, I), bias (k, O).

    weight: where all begin; None draws each within 1 / sqrt(I), biases too.
    """

    what = "an ensemble"

    def __init__(self, state: Any, adapter: str, k: int, module: nn.Module, copied: bool):
        super().__init__(state, adapter)
        weight = wide(module.weight.detach())        # type: ignore[operator]
        bias: Any = module.bias
        bound = 1 / math.sqrt(weight.shape[1])

        def made(t: Tensor) -> nn.Parameter:
            own = t.expand(k, *t.shape).clone() if copied else \
                torch.empty(k, *t.shape, dtype=t.dtype).uniform_(-bound, bound)
            return nn.Parameter(own)

        self.weight = made(weight)
        self.bias = None if bias is None else made(wide(bias.detach()))

    def around(self, module: nn.Module, call: Callable[..., Any], x: Tensor, *args: Any,
               **kw: Any) -> Any:
        x = by_member(x, len(self.weight))
        y = torch.einsum("nk...i,koi->nk...o", x, self.weight.to(x.dtype))
        y = y if self.bias is None else y + _rows(self.bias, y)
        return y.flatten(0, 1)

    @torch.no_grad()
    def member(self, i: int, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(weight (O, I), bias) of one member by itself."""
        return self.weight[i].clone(), None if self.bias is None else self.bias[i].clone()


class Ensemble(Listener):
    """Listens to the model: gives it every sample k times and takes the mean of the answers.

    Where a loss is to be made of them it is of each member by itself: what the model returns while
    it trains has k rows a sample, and whoever makes the loss is told (``riding.answers``). A loss
    that the model makes is of all rows, and its other outputs are the means.

    probabilities: the mean is that of softmax (of one output: of sigmoid), given as logits again.
    answers (k,): which members count in a mean; a buffer, in files.
    """

    what = "an ensemble"
    answers: Tensor

    def __init__(self, state: Any, adapter: str, k: int, probabilities: bool):
        super().__init__(state, adapter)
        self.k, self.probabilities = k, probabilities
        self.register_buffer("answers", torch.ones(k, dtype=torch.bool))

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not self.here.samples:
            raise RecipeError("an ensemble repeats the samples that a model is called with, and "
                              "there is no tensor among its arguments")
        n = self.here.samples[0]
        out = call(*repeated(args, self.k, n), **repeated(kw, self.k, n))
        riding = self.state.riding
        whole = isinstance(out, Tensor) and out.dim() > 0
        if whole and (self.training or riding.collected is not None
                      or riding.outside and torch.is_grad_enabled()):
            riding.answers = self.k
            return out
        return _mapped(out, lambda t: self.mean(t) if t.dim() and len(t) == n * self.k
                       and t.is_floating_point() else t)

    def mean(self, rows: Tensor) -> Tensor:
        """(N k, C) as (N, C)."""
        z = by_member(wide(rows), self.k)
        counts = self.answers.to(z.dtype).view(-1, *(1,) * (z.dim() - 2))
        share = counts / counts.sum()
        if not self.probabilities:
            return (z * share).sum(1).to(rows.dtype)
        if z.shape[-1] == 1:                         # a sigmoid is the softmax of 0 and z
            p = (torch.cat([torch.zeros_like(z), z], -1).log_softmax(-1) + share.log()).logsumexp(1)
            return (p[..., 1:] - p[..., :1]).to(rows.dtype)
        return (z.log_softmax(-1) + share.log()).logsumexp(1).to(rows.dtype)

    @torch.no_grad()
    def prune(self, score: Callable[[], float]) -> list[int]:
        """Leave out, one by one, members without whom the score is no lower; those that stay."""
        best = score()
        for i in range(self.k):
            if int(self.answers.sum()) == 1:
                break
            self.answers[i] = False
            now = score()
            self.answers[i] = now < best
            best = max(best, now)
        return self.answers.nonzero().flatten().tolist()


def _mapped(out: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A model's outputs with f of every tensor among them."""
    if isinstance(out, Tensor):
        return f(out)
    if isinstance(out, Mapping):
        new: Any = copy.copy(out)
        for key, value in out.items():
            new[key] = _mapped(value, f)
        return new
    if isinstance(out, tuple | list):
        make: Any = getattr(out, "_make", type(out))
        return make([_mapped(v, f) for v in out])
    if hasattr(out, "__dict__"):
        new = copy.copy(out)
        vars(new).update({k: _mapped(v, f) for k, v in vars(out).items()})
        return new
    return out
