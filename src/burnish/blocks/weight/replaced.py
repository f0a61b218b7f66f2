"""A weight whose place two smaller ones take, and a model of which only these are left.

Letters: N tokens, O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Place
from .term import Wrap

#: columns of the weight that are compared with the product at a time
PANEL = 1 << 22


class Replaced(Wrap):
    """``W' = B A``: A (rank, in), B (out, rank) in fp32 at least; W itself has no say any more.

    Nothing that is added to W would be heard, so nothing may stand there beside it.
    """

    deaf = True

    def __init__(self, place: Place, A: Tensor, B: Tensor):
        super().__init__()
        self.place = place
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())

    def of(self, V: Tensor) -> Tensor:
        return (self.B @ self.A).to(V.dtype)

    def linear(self, x: Tensor, op: object, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        """``(x A^T) B^T + b``: W is not read, and no product of the factors is made."""
        h = F.linear(x, self.A.to(x.dtype))
        return F.linear(h, self.B.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def restart(self, V: Tensor) -> None:
        """The factors stay those of the weight as the model had it."""


@torch.no_grad()
def farthest(A: Tensor, B: Tensor, W: Tensor) -> tuple[int, int]:
    """(o, i) of the largest ``|B A - W|``, the first of equals; a panel at a time."""
    found = []
    step = max(1, PANEL // W.shape[0])
    for i in range(0, W.shape[1], step):
        off = (B @ A[:, i : i + step] - W[:, i : i + step].to(A.dtype)).abs()
        k = int(off.argmax())
        found.append((float(off.view(-1)[k]), k // off.shape[1], i + k % off.shape[1]))
    _, o, i = max(found, key=lambda one: one[0])
    return o, i


@torch.no_grad()
def in_two(model: nn.Module, factors: Iterable[tuple[str, Tensor, Tensor]]) -> Callable[[], None]:
    """Two linears in a row in the place of each module named: (path, A, B), the module's own bias
    on the second; ordinary modules, ``<path>.0`` and ``<path>.1``, in its precision. Gives the way
    back."""
    were = []
    for path, A, B in factors:
        module = model.get_submodule(path)
        pair = nn.Sequential(*(nn.Linear(*reversed(M.shape), bias=False, device="meta")
                               for M in (A, B)))
        for linear, weight in zip(pair, (A, B), strict=True):
            made = weight.detach().to(module.weight.dtype, copy=True)
            linear.weight = nn.Parameter(made, requires_grad=False)
        pair[1].bias = module.bias
        model.set_submodule(path, pair.train(module.training))
        were.append((path, module))

    def back() -> None:
        for path, module in were:
            model.set_submodule(path, module)

    return back
