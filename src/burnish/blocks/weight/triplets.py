"""Updates in singular-value form, whose rank may change while they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.site import Place
from ..update.objective import OnWeights
from .paired import Paired

#: what stands for E in the components that wait
WAITING = 1e-5


class Triplets(Paired):
    """``Delta = s P diag(E) Q``: P (out, r), E (r,), Q (r, in). Keeps x and r numbers per token.

    waiting: further components of P and Q, which train while 1e-5 stands for their E: all but
    without effect until they are set free. No weight decay: ``crooked`` holds P and Q.
    """

    #: tensor -> the axis along which its rank lies
    ranked: ClassVar[dict[str, int]] = {"P": 1, "E": 0, "Q": 0}

    def __init__(self, place: Place, rank: int, scale: float, waiting: int = 0):
        super().__init__()
        self.P = nn.Parameter(torch.randn(place.out, rank + waiting) * 0.02)
        self.E = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.randn(rank + waiting, place.inp) * 0.02)
        self.scale = scale
        for p in self.parameters():
            p.burnish_decay = False                  # type: ignore[attr-defined]

    @property
    def rank(self) -> int:
        """Components that count."""
        return self.E.numel()

    @property
    def most(self) -> int:
        """The rank it can have."""
        return min(self.P.shape[0], self.Q.shape[1])

    @property
    def waiting(self) -> int:
        return self.P.shape[1] - self.rank

    def diagonal(self) -> Tensor:
        """What stands between P and Q."""
        w = self.waiting
        return torch.cat([self.E, self.E.new_full((w,), WAITING)]) if w else self.E

    def settled(self) -> dict[str, Any]:
        """What a file must know to make this term again."""
        return {"rank": self.rank, **({"waiting": self.waiting} if self.waiting else {})}

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.Q, self.scale * (self.P * self.diagonal())


def crooked(sides: Sequence[tuple[nn.Parameter, nn.Parameter]], weight: float
            ) -> Iterator[OnWeights]:
    """``weight * mean ||P^T P - I||_F`` over all P (out, r) and Q^T of Q (r, in), tensor by
    tensor."""
    each = weight / (2 * len(sides)) if sides else 0.0
    for left, right in sides:
        for factor, gram in ((left, lambda P: P.t() @ P), (right, lambda Q: Q @ Q.t())):
            yield OnWeights((factor,), partial(_off, factor, gram, each))


def _off(factor: nn.Parameter, gram: Callable[[Tensor], Tensor], weight: float) -> Tensor:
    made = gram(factor)
    return weight * torch.linalg.matrix_norm(made - torch.eye(len(made), dtype=made.dtype,
                                                              device=made.device))
