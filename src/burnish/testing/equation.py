"""A tuned model beside the equation it is to compute, written out by whoever tests it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def follows(tuned: Any, equation: Callable[..., Tensor], theta: Sequence[Tensor],
            x: Tensor | Sequence[int], *, rtol: float = 1e-8, atol: float = 1e-10,
            merged: bool = True) -> None:
    """Outputs, the gradients of the input and of every letter, and the merged model's outputs are
    those of ``equation(x, *letters)``.

    theta: the tensors of the tuned model that are the equation's letters. The equation is given
    copies of them, leaves in their own precision, so that nothing of the model is in its graph.
    x: an input, or the shape of one, then drawn in float64. Of the model all that trains is to be a
    letter. merged: False where the update does not merge; the model is left as it was.

    Raises AssertionError where the two differ by more than rtol and atol, where a tensor trains
    that is no letter, and for a letter that moves nothing, of which the test would say nothing.
    """
    own = list(theta)
    unnamed = {id(p) for p in tuned.parameters()} - {id(t) for t in own}
    assert not unnamed, f"{len(unnamed)} tensors train that are no letter of the equation"
    x = x if isinstance(x, Tensor) else torch.randn(*x, dtype=torch.float64)
    mine, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
    letters = [t.detach().clone().requires_grad_() for t in own]
    got, want = tuned.model(mine), equation(theirs, *letters)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    g = torch.randn_like(want)
    for k, (a, b) in enumerate(zip(torch.autograd.grad(got, [mine, *own], g),
                                   torch.autograd.grad(want, [theirs, *letters], g), strict=True)):
        what = f"letter {k - 1}" if k else "the input"
        assert b.count_nonzero() or not b.numel(), f"the equation does not depend on {what}"
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=f"gradient of {what}: {{}}"
                                   .format)
    if merged:
        torch.testing.assert_close(tuned.merge()(x), want, rtol=rtol, atol=atol)
        tuned.unmerge()
