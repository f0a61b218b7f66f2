"""The self-check: one traced step on fake tensors, before anything runs.

A silent no-op is what users of other libraries suffer from most: an adapter that is attached but
never called, a block whose gradient is cut. The step is traced with fake copies of everything, so
it costs no memory, changes nothing and takes a moment.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from ..core.errors import CheckError
from ..core.processes import anywhere, here
from .swap import ATTR

if TYPE_CHECKING:
    from .tuned import Tuned


def check(tuned: Tuned, example: Any) -> None:
    """Every attached tensor is reached by the forward and by the gradient of `example`'s loss.

    Raises CheckError naming the tensors that are not.
    """
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
    _reached(tuned, missing, "no gradient from the loss of the example", len(names))


def check_gradients(tuned: Tuned) -> None:
    """See :meth:`burnish.Tuned.check_gradients`."""
    held = {id(p) for g in tuned.current_optimizer.param_groups for p in g["params"]}
    loose = [n for n, p in tuned.named_parameters() if id(p) not in held]
    if loose:
        more = f" and {len(loose) - 4} more" if len(loose) > 4 else ""
        raise CheckError(f"{len(loose)} trainable tensors are not in the optimizer: "
                         f"{', '.join(loose[:4])}{more}. It was made before they trained: call "
                         "tuned.optimizer(...) again after use(...)")
    if getattr(tuned.current_optimizer, "zeroth_order", False) or \
            getattr(getattr(tuned.current_optimizer, "plan", None), "in_backward", False):
        return                               # gradients do not exist, or not all at once
    missing = [n for n, p in tuned.named_parameters() if p.grad is None]
    _reached(tuned, missing, "no gradient after the first step", len(held))
    bad = [n for n, p in tuned.named_parameters()
           if p.grad is not None and not isinstance(here(p.grad), FakeTensor)
           and not _finite(here(p.grad))]
    shards = tuned.state.shards
    if shards is not None and anywhere(bool(bad), shards.average.group) and not bad:
        raise CheckError("another process has a gradient that is not finite in the first step")
    if bad:
        raise CheckError(_unreached(bad, "a gradient that is not finite in the first step"))


def _reached(tuned: Tuned, missing: list[str], what: str, of: int) -> None:
    """An added tensor without a gradient is an error; one of the model's own, chosen among others,
    is only named: models hold tensors that some batches do not use (a mask token)."""
    added = [n for n in missing if f".{ATTR}." in f".{n}"]
    if added or len(missing) == of and missing:
        raise CheckError(_unreached(added or missing, what))
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        note = (f"{len(missing)} tensors of the model get no gradient and stay as they are: "
                f"{', '.join(missing[:4])}{more}")
        if note not in tuned.active.notes:
            tuned.active.notes.append(note)


def _finite(grad: Tensor) -> bool:
    """No inf, no nan; by a reduction, so that nothing of the gradient's size is made."""
    return math.isfinite(float(torch.linalg.vector_norm(grad, ord=math.inf))) \
        if grad.numel() else True


def _unreached(names: list[str], what: str) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (f"{len(names)} trainable tensors have {what}: {', '.join(names[:4])}{more}. "
            "They are not part of the computation of this batch: check targets, or that the "
            "batch reaches that part of the model")
