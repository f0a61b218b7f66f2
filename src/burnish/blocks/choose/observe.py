"""Statistics that methods read before they start: streamed, one batch at a time.

A method says what it wants of a place (`Method.observe`); the data pass (engine/observe.py) feeds
it. A statistic of inputs is given ``x`` as the module gets it, (batch, tokens..., in), and which
tokens count; a statistic of gradients is given dL/dW, (out, in), once per batch; a statistic of
weights is given W, (out, in), once, and no data are needed for it. Two statistics with the same
`key` on the same input are one: q, k and v share what they read.

Everything is accumulated in fp32 at least, on the device of what is read, and holds no more than
its `nbytes`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd

#: what a statistic is shown
Reads = Literal["input", "ends", "gradient", "both", "weight"]


class Statistic:
    """What is gathered at one place.

    reads: "input" (the module's input), "ends" (its output too), "gradient" (of the loss, by the
        weight), "both" (input and gradient), or "weight".
    alone: every sample makes a pass of its own.
    turns: how places take turns: "budget", in rounds that fit one; "blocks", one block of the model
        after the other, whole, each once the one before was dealt with; "once", all in one round.
    condenses: `settle` keeps little of it once its round is over, so that places decide together
        and yet need not stand together.
    """

    reads: ClassVar[Reads] = "input"
    alone: ClassVar[bool] = False
    turns: Literal["budget", "blocks", "once"] = "budget"
    condenses: ClassVar[bool] = False

    @property
    def key(self) -> Hashable:
        """Equal for statistics that are the same on the same input."""
        return (type(self), *(v for v in vars(self).values() if not isinstance(v, Tensor)))

    @property
    def nbytes(self) -> int:
        """Bytes held once something was read."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """Nothing more need be read."""
        return False

    def leads(self, way: Tensor) -> None:
        """Told before a point is read from, where a method moves the weights (`Method.travel`): how
        far this weight goes in all, (out, in)."""

    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Read one batch. valid: (batch, tokens) of bool, True where a token counts."""
        raise NotImplementedError

    def weigh(self, W: Tensor) -> None:
        """Shown the weight, (out, in), before any data, where it is overridden."""

    def answered(self, y: Tensor, valid: Tensor | None = None) -> None:
        """Read what the module makes of the last input (of one that reads "ends")."""

    def pull(self, g: Tensor) -> None:
        """Read the gradient of one batch, (out, in)."""
        self.update(g)


def wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def samples(x: Tensor, valid: Tensor | None) -> list[Tensor]:
    """The tokens (n, in) of each sample of a batch (batch, ..., in), padding left out."""
    if x.dim() < 3:
        return list(x.reshape(-1, 1, x.shape[-1]))
    rows = x.flatten(1, -2)
    if valid is None or valid.shape != rows.shape[:2]:
        return list(rows)
    return [r[v] for r, v in zip(rows, valid.to(x.device), strict=True)]


def tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """All tokens (N, in) of a batch, padding left out."""
    return torch.cat(samples(x, valid)) if valid is not None else x.reshape(-1, x.shape[-1])


class Covariance(Statistic):
    """``C = (1 / n) sum over samples of X^T X``, (in, in); X (tokens, in) of one sample.

    scaled: divide each sample by its largest absolute entry first, so that none outweighs the
    others and nothing overflows.
    """

    def __init__(self, width: int, scaled: bool = False):
        self.width, self.scaled = width, scaled
        self.total: Tensor | None = None
        self.count: Tensor = torch.zeros(())

    @property
    def nbytes(self) -> int:
        return 4 * self.width**2

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        if self.total is None:
            self.total = wide(x.new_zeros(self.width, self.width))
        for X in samples(x, valid):
            if not X.numel():
                continue
            X = wide(X)
            if self.scaled and (top := X.abs().amax()) > 0:
                X = X / top
            self.total.addmm_(X.t(), X)
            self.count = self.count + 1

    @property
    def value(self) -> Tensor:
        assert self.total is not None, "nothing was read"
        return self.total / self.count.to(self.total.device).clamp(min=1)


class AbsMax(Statistic):
    """The largest absolute value of each input feature, (in,)."""

    def __init__(self, width: int):
        self.width = width
        self.value: Tensor = torch.zeros(())

    @property
    def nbytes(self) -> int:
        return 4 * self.width

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        rows = tokens(x, valid)
        if rows.numel():
            top = wide(rows).abs().amax(0)
            self.value = torch.maximum(self.value.to(top.device), top)


class Principal(Statistic):
    """Principal directions of the inputs by incremental PCA: k directions, no (in, in) matrix.

    Each batch X (n, in) is stacked under what is known, ``[diag(S) V; X - mean_X;
    sqrt(m n / (m + n)) (mean - mean_X)]``, and cut to its k largest singular directions again.
    V (k, in) rows are orthonormal, signed so that the largest entry of each is positive; S (k,).

    done: the first `needed` directions moved by less than cos = `tolerance` in the last batch.
    """

    def __init__(self, width: int, k: int, tolerance: float = 0.99):
        self.width, self.k, self.tolerance = width, min(k, width), tolerance
        self.V: Tensor = torch.zeros(0, width)
        self.S: Tensor = torch.zeros(0)
        self.mean: Tensor = torch.zeros(width)
        self.square: Tensor = torch.zeros(width)     # sum of squared deviations from the mean
        self.n: Tensor = torch.zeros((), dtype=torch.int64)
        self.same: Tensor = torch.zeros(0, dtype=torch.bool)
        self.needed: Tensor = torch.tensor(self.k)

    @property
    def nbytes(self) -> int:
        return 4 * self.width * (self.k + 2)

    @property
    def done(self) -> bool:
        need = int(self.needed)
        return self.same.numel() >= need and bool(self.same[:need].all())

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        X = wide(tokens(x, valid))
        n, m = X.shape[0], int(self.n)
        if not n:
            return
        V, S = self.V.to(X), self.S.to(X)
        mean, centre = self.mean.to(X), X.mean(0)
        stack = torch.cat([S.unsqueeze(1) * V, X - centre,
                           ((m * n / (m + n)) ** 0.5 * (mean - centre)).unsqueeze(0)])
        _, S_new, V_new = svd(stack, self.k)
        V_new = V_new * torch.where(V_new.gather(1, V_new.abs().argmax(1, keepdim=True)) < 0, -1, 1)
        both = min(len(V), len(V_new))
        cos = (V[:both] * V_new[:both]).sum(1)
        self.same = torch.zeros(len(V_new), dtype=torch.bool)
        self.same[:both] = (cos >= self.tolerance).cpu()
        self.square = self.square.to(X) + (X - centre).square().sum(0) \
            + (mean - centre).square() * (m * n / (m + n))
        self.mean = mean + (centre - mean) * (n / (m + n))
        self.V, self.S, self.n = V_new, S_new, self.n + n

    @property
    def explained(self) -> Tensor:
        """Share of the inputs' variance along each direction: S^2 / (N sum of variances)."""
        return self.S.square() / self.square.sum().clamp(min=torch.finfo(self.S.dtype).tiny)


class Gradient(Statistic):
    """Mean over batches of dL/dW, (out, in), kept on the host so that the device holds one."""

    reads: ClassVar[Reads] = "gradient"

    def __init__(self, out: int, inp: int):
        self.out, self.inp = out, inp
        self.total: Tensor = torch.zeros(())
        self.count: Tensor = torch.zeros(())

    @property
    def nbytes(self) -> int:
        return 4 * self.out * self.inp

    def what(self, g: Tensor) -> Tensor:
        return g

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        g = self.what(wide(x)).to("cpu")
        self.total = self.total + g if self.total.dim() else g.clone()
        self.count = self.count + 1

    @property
    def value(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


class SquaredGradient(Gradient):
    """Mean over samples of (dL/dW)^2, the diagonal of the (empirical) Fisher matrix."""

    alone: ClassVar[bool] = True

    def what(self, g: Tensor) -> Tensor:
        return g.square()


class OutputCovariance(Statistic):
    """``sum over batches of G G^T``, (out, out), G = dL/dW: which outputs' directions matter."""

    reads: ClassVar[Reads] = "gradient"

    def __init__(self, out: int):
        self.out = out
        self.value: Tensor = torch.zeros(())

    @property
    def nbytes(self) -> int:
        return 4 * self.out**2

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        g = wide(x)
        self.value = g @ g.t() if not self.value.dim() else self.value.addmm_(g, g.t())


class Spectrum(Statistic):
    """Of a weight: the share of ``||W||_F^2`` that its `k` largest singular values leave."""

    reads: ClassVar[Reads] = "weight"

    def __init__(self, k: int):
        self.k = k
        self.value: Tensor = torch.zeros(())

    @property
    def nbytes(self) -> int:
        return 4

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        W = wide(x)
        first = svd(W, self.k)[1].square().sum()
        whole = W.square().sum().clamp(min=torch.finfo(W.dtype).tiny)
        self.value = (1 - first / whole).cpu()
