"""What single input features do: how large they are, where their mean lies, how much they move.

O(in) numbers a place, read one batch at a time. Padding does not count.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from .observe import Gradient, Reads, SquaredGradient, Statistic, samples, tokens, wide


class Norms(Statistic):
    """``|x_j|^2``: squares summed over the tokens of a sample, averaged over samples, (in,)."""

    def __init__(self, width: int, turns: Literal["budget", "blocks", "once"] = "budget"):
        self.width, self.turns = width, turns
        self.total: Tensor = torch.zeros(width)
        self.count = 0

    @property
    def nbytes(self) -> int:
        return 4 * self.width

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        self.count += sum(X.numel() > 0 for X in samples(x, valid))
        squares = wide(tokens(x, valid)).square().sum(0)
        self.total = self.total.to(squares) + squares

    @property
    def square(self) -> Tensor:
        return self.total / max(1, self.count)

    @property
    def norm(self) -> Tensor:
        """The root of the mean square, (in,)."""
        return self.square.sqrt()


class Moments(Norms):
    """Mean and variance over all tokens besides, (in,) each: Welford's sums, batch by batch."""

    def __init__(self, width: int, turns: Literal["budget", "blocks", "once"] = "budget"):
        super().__init__(width, turns)
        self.mean: Tensor = torch.zeros(width)
        self.spread: Tensor = torch.zeros(width)     # sum of squared deviations from the mean
        self.n = 0

    @property
    def nbytes(self) -> int:
        return 12 * self.width

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        super().update(x, valid)
        X = wide(tokens(x, valid))
        if not (m := X.shape[0]):
            return
        n, centre = self.n, X.mean(0)
        off = centre - self.mean.to(X)
        self.spread = self.spread.to(X) + (X - centre).square().sum(0) \
            + off.square() * (n * m / (n + m))
        self.mean = self.mean.to(X) + off * (m / (n + m))
        self.n = n + m

    @property
    def variance(self) -> Tensor:
        return self.spread / max(1, self.n)


class MeanSize(Statistic):
    """``mean |x|`` over all numbers of all tokens."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(())
        self.n = 0

    @property
    def nbytes(self) -> int:
        return 4

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        X = wide(tokens(x, valid))
        self.total = self.total.to(X) + X.abs().sum()
        self.n += X.numel()

    @property
    def value(self) -> float:
        return float(self.total) / max(1, self.n)


class Ranges(Statistic):
    """The smallest and the largest number that a layer reads, and that it gives, (2,) each; zero
    always counts, padding does not."""

    reads: ClassVar[Reads] = "ends"

    def __init__(self) -> None:
        self.read = torch.zeros(2)
        self.given = torch.zeros(2)

    @property
    def nbytes(self) -> int:
        return 16

    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        self.read = _wider(self.read, x, valid)

    def answered(self, y: Tensor, valid: Tensor | None = None) -> None:
        self.given = _wider(self.given, y, valid)


@torch.no_grad()
def _wider(known: Tensor, x: Tensor, valid: Tensor | None) -> Tensor:
    """(low, high) of what is known and of the tokens of x."""
    rows = wide(tokens(x, valid))
    if not rows.numel():
        return known
    known = known.to(rows)
    return torch.stack([torch.minimum(known[0], rows.amin()),
                        torch.maximum(known[1], rows.amax())])


class ChannelRanges(Statistic):
    """The smallest and the largest number of each input feature, (2, in); padding does not count,
    nor does zero by itself."""

    def __init__(self, width: int):
        self.width = width
        self.value: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 8 * self.width

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        rows = wide(tokens(x, valid))
        if rows.numel():
            low, high = torch.aminmax(rows, dim=0)
            if self.value is not None:
                low, high = torch.minimum(low, self.value[0]), torch.maximum(high, self.value[1])
            self.value = torch.stack([low, high])


class Sizes(Gradient):
    """Mean of |dL/dW|."""

    def what(self, g: Tensor) -> Tensor:
        return g.abs()


class NormsAndGradient(Norms):
    """Norms of the inputs, and of each entry's gradient: ``|g|``, (out, in), over samples, each in
    a pass of its own: the root of the mean square, or the mean of absolute values. The gradients
    wait on the host.

    scale: what the loss was multiplied by, taken off again.
    """

    reads: ClassVar[Reads] = "both"
    alone: ClassVar[bool] = True

    def __init__(self, out: int, inp: int, norm: Literal["l1", "l2"], scale: float = 1.0,
                 turns: Literal["budget", "blocks", "once"] = "budget"):
        super().__init__(inp, turns)
        self.scale = scale
        self.gradients = SquaredGradient(out, inp) if norm == "l2" else Sizes(out, inp)

    @property
    def key(self) -> int:
        return id(self)                              # a gradient is its own place's alone

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.gradients.nbytes

    def pull(self, g: Tensor) -> None:
        self.gradients.update(wide(g) / self.scale)

    @property
    def gradient(self) -> Tensor:
        """``|g|`` on the host, (out, in)."""
        found = self.gradients.value
        return found.sqrt() if isinstance(self.gradients, SquaredGradient) else found
