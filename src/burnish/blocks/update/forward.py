"""Steps along random directions by the loss's exact slope there, found in one forward.

    v ~ N(0, I),   g = <grad L(theta), v>           theta <- theta - lr g v

Forward-mode differentiation carries (value, tangent) through the model. Weights are read as theta
with the tangent v, which is drawn from a counter stream as in zeroth.py and never kept from one
step to the next; a run's log repeats it in the same way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

from ...core.errors import BurnishError, ConfigError
from .plan import Plan
from .precise import host_float
from .scratch import Evaluate, perturbed
from .zeroth import Mode, ZerothOrder, ZerothOrderOptimizer


@dataclass(frozen=True, kw_only=True)
class ForwardGrad(ZerothOrder):
    """The innermost answer: see the module."""

    honours: ClassVar[frozenset[str]] = ZerothOrder.honours - {"objective"}
    why: ClassVar[Mapping[str, str]] = {
        **ZerothOrder.why,
        "objective": "a slope is read off the task's loss alone"}

    reads_model: ClassVar[bool] = True
    mode: Mode = "in_place"                      # nothing is perturbed
    name: str = "forward_grad"

    def make(self, groups: list[dict[str, Any]], plan: Plan, seed: int) -> ForwardGradOptimizer:
        return ForwardGradOptimizer(groups, self, plan, seed)


class ForwardGradOptimizer(ZerothOrderOptimizer):
    """See the module. `model` must be set: tangents stand in the place of its parameters."""

    _found = 0.0

    def _slope(self, seed: int, eps: float
               ) -> Generator[Evaluate, float, tuple[float, Sequence[float]]]:
        if self.model is None:
            raise ConfigError(f"{self.spec.name} reads the weights of a model with their tangents: "
                              "use tuned.step(batch), or set optimizer.model")
        where = Tangents(self.model, self.named(), seed, self.noise)
        loss = yield self._at(where)
        slope, loss = self._of_all(self._found, loss)
        return slope, (loss,)

    def _read(self, value: Any) -> float:
        tangent = forward_ad.unpack_dual(value).tangent if isinstance(value, Tensor) else None
        if tangent is None:
            raise BurnishError(f"{self.spec.name}: the loss has no slope along what trains: it is "
                               "no tensor, or was computed otherwise than by operations with a "
                               "forward derivative")
        self._found = host_float(tangent, self.spec.name)
        return host_float(value, self.spec.name)


class _InRows(TorchFunctionMode):
    """Group norms read contiguous inputs: torch has no forward derivative of one on others."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


class Tangents(AbstractContextManager[None]):
    """Weights read with the tangent z of a seed. Attention is computed by the operations that it
    consists of: fused ones have no forward derivative."""

    def __init__(self, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]], seed: int,
                 noise: Any):
        self.model, self.named, self.seed, self.noise = model, list(named), seed, noise
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(forward_ad.dual_level())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_InRows())
            self._plain_experts(stack)
            stack.enter_context(_reparametrize_module(
                self.model, {n: self._dual(n, p.detach()) for n, p in self.named},
                tie_weights=True))
            self.stack = stack.pop_all()

    def _plain_experts(self, stack: ExitStack) -> None:
        """Transformers' experts one after the other: a grouped product has no forward derivative
        either."""
        choose = getattr(self.model, "set_experts_implementation", None)
        was = getattr(getattr(self.model, "config", None), "_experts_implementation", None)
        if choose is not None and was not in (None, "eager"):
            choose("eager")
            stack.callback(choose, was)

    def _dual(self, name: str, p: Tensor) -> Tensor:
        z = perturbed(torch.zeros_like(p), name, self.seed, 1.0, torch.empty_like(p), self.noise)
        return forward_ad.make_dual(p, z)

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
