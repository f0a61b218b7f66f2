"""Steps of gradient descent on factors that are tensors of a graph, so that a loss after them can
be taken back to where they began and to their rates.

    phi_{k+1} = phi_k - eta_k * grad mean_i l(c_i; phi_k)          k = 0 .. K - 1, c_i rows

Through the last `through` steps goes the whole derivative (second order); of those before, the
gradient is a constant, and phi_0 and eta are reached past it. Rows are gone through `rows` at a
time, their gradients added, so that without a graph memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...core.errors import CheckError

#: name -> tensor
Values = Mapping[str, Tensor]


def unrolled(phi: Values, rates: Sequence[Values], loss: Callable[[Values, int, int], Tensor],
             count: int, rows: int, through: int) -> dict[str, Tensor]:
    """phi after as many steps as there are rates.

    loss: (phi, start, stop) -> the sum over these rows of what each says.  count: rows there are.
    through: steps at the end that are differentiated; those before hand on gradients as constants.
    """
    now = dict(phi)
    for k, eta in enumerate(rates):
        whole = k >= len(rates) - through
        at = now if whole else {n: t.detach().requires_grad_() for n, t in now.items()}
        total: list[Tensor] | None = None
        for start in range(0, count, rows):
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):   # others know no second time
                value = loss(at, start, min(count, start + rows)) / count
            found = torch.autograd.grad(value, list(at.values()), create_graph=whole)
            total = list(found) if total is None else \
                [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        if not all(bool(g.isfinite().all()) for g in total):
            raise CheckError(f"the gradient of inner step {k + 1} is not finite")
        now = {n: t - eta[n] * g for (n, t), g in zip(now.items(), total, strict=True)}
    return now


@contextmanager
def factors_standing(modules: Mapping[str, tuple[nn.Module, float]], phi: Values) -> Iterator[None]:
    """Inside, ``y + scale (x A^T) B^T`` at each linear; phi has ``name.A`` and ``name.B``."""
    handles = []

    def hook(name: str, scale: float) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple[Tensor, ...], kw: dict[str, Tensor], y: Tensor
                ) -> Tensor:
            x = args[0] if args else next(iter(kw.values()))
            A, B = phi[f"{name}.A"], phi[f"{name}.B"]
            return y + (scale * (x.to(A.dtype) @ A.T) @ B.T).to(y.dtype)
        return add

    try:
        for name, (module, scale) in modules.items():
            handles.append(module.register_forward_hook(hook(name, scale), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
