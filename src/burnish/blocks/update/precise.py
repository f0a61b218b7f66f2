"""Losses in fp32, whatever the logits are held in.

A difference of two losses is what a zeroth-order step lives on, and it is about 1e-3. A loss of 2
in bf16 has a spacing of 0.0156: computed there, both losses are the same number and the step is
zero. So while a loss is evaluated for its *value*, every loss function gets its half-precision
inputs in fp32, wherever it is called (inside the model or behind it), and what the model returns
for a loss outside is widened too. The model's own body stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.errors import BurnishError, ConfigError


class NotFinite(BurnishError):
    """A loss that is no number, before anything moved. loss: it."""

    def __init__(self, name: str, loss: float):
        super().__init__(f"{name}: the loss is {loss}; nothing was updated")
        self.loss = loss


HALF = (torch.float16, torch.bfloat16)
#: besides everything called ``*_loss``; what hand-written losses begin with
_LOSSES = frozenset(("cross_entropy", "kl_div", "binary_cross_entropy", "log_softmax",
                     "log_sigmoid", "binary_cross_entropy_with_logits", "logsumexp",
                     "nll_loss_nd"))


def widened(x: Any) -> Any:
    """A half-precision tensor in fp32; anything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


class Fp32Losses(TorchFunctionMode):
    """Inside, loss functions read half-precision arguments in fp32 and answer in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self._is_loss: dict[Any, bool] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        loss = self._is_loss.get(func)
        if loss is None:
            name = getattr(func, "__name__", "")
            loss = self._is_loss[func] = name in _LOSSES or name.endswith("_loss")
        if loss:
            args = tuple(widened(a) for a in args)
            kwargs = {k: widened(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


class Evaluation(AbstractContextManager[None]):
    """One evaluation of a loss for its value: inside `where`, with losses in fp32.

    more: contexts to be inside of as well.
    model: its outputs are widened where it returns no loss of its own, for one computed outside.
    """

    def __init__(self, where: AbstractContextManager[Any], model: nn.Module | None,
                 *more: AbstractContextManager[Any]):
        self.where, self.model, self.more, self._stack = where, model, more, ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in (self.where, *self.more):
                stack.enter_context(context)
            stack.enter_context(Fp32Losses())
            if self.model is not None:
                hook = self.model.register_forward_hook(lambda _m, _a, out: _outputs(out))
                stack.callback(hook.remove)
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _outputs(out: Any) -> Any:
    """What a loss outside reads: the tensors the model returns, one level deep."""
    if isinstance(out, Tensor):
        return widened(out)
    if type(out) in (tuple, list):
        return type(out)(widened(t) for t in out)
    if isinstance(out, Mapping) and out.get("loss") is None:
        for key, value in out.items():
            if (wide := widened(value)) is not value:
                out[key] = wide                    # type: ignore[index]
    return out


def no_value(value: Any) -> bool:
    """Is it a loss of fake tensors?"""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def host_float(loss: Any, name: str = "mezo") -> float:
    """The loss as a Python float. A fake tensor has no value: 1.0 stands for it, so that a
    simulated step runs through every tensor of a real one.

    Raises ConfigError for more than one number, and for a loss in half precision.
    """
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1:
        raise ConfigError(f"the loss must be one number, got shape {tuple(loss.shape)}")
    if loss.dtype in HALF:
        raise ConfigError(f"{name}: the loss is {str(loss.dtype).removeprefix('torch.')}, whose "
                          "spacing is wider than the differences the step is made of; compute it "
                          "in fp32, e.g. from logits.float()")
    return 1.0 if no_value(loss) else float(loss.detach().double())
