"""The self-check: one traced step on fake tensors, before anything runs.

A silent no-op is what users of other libraries suffer from most: an adapter that is attached but
never called, a block whose gradient is cut. The step is traced with fake copies of everything, so
it costs no memory, changes nothing and takes a moment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from ..core.errors import CheckError

if TYPE_CHECKING:
    from .tuned import Tuned


def check(tuned: Tuned, example: Any) -> None:
    """Every attached tensor is reached by the forward and by the gradient of `example`'s loss.

    Raises CheckError naming the tensors that are not.
    """
    from .tuned import _unreached

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        def fake(t: Any) -> Any:
            return mode.from_tensor(t) if isinstance(t, Tensor) else t

        batch = pytree.tree_map(fake, example)
        state = {n: fake(t) for n, t in (*tuned.model.named_parameters(),
                                         *tuned.model.named_buffers())}
        names = [n for n, _ in tuned.named_parameters()]
        # the swap holds through backward too: checkpointed blocks read their weights there
        with _reparametrize_module(tuned.model, state, tie_weights=True), torch.enable_grad():
            loss = tuned.loss(batch)
            if not loss.requires_grad:
                raise CheckError(_unreached(names, "no part in the loss of the example"))
            got = torch.autograd.grad(loss, [state[n] for n in names], allow_unused=True)
    missing = [n for n, g in zip(names, got, strict=True) if g is None]
    if missing:
        raise CheckError(_unreached(missing, "no gradient from the loss of the example"))

