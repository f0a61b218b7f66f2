"""A step in two parts: gradients from a block on, probes below it.

    first k blocks, and what runs before them     theta <- theta - rate lr (g z + wd theta)
    the other blocks, and what runs after them    theta <- theta - lr rule(dL/dtheta)

Both are taken at the same weights on the same batch. While the gradients are made, what is below
block k asks for none, so that nothing there makes a graph: neither activations nor gradients nor
moments of it are kept. What is below is read off the first evaluation: a tensor whose module runs
before block k does (of a module that runs twice, the first time counts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...core.errors import ConfigError, FormatError, RecipeError
from ...core.processes import processes
from .noise import ScalarLog, fold
from .plan import Plan
from .precise import Evaluation, NotFinite
from .rules import AdamW, Rule
from .scratch import Callers, Evaluate
from .subspace import in_memory_order
from .zeroth import ZerothOrder
from .zoo import Zoo, ZooOptimizer


@dataclass(frozen=True, kw_only=True)
class Hybrid(Zoo):
    """The innermost answer of a step in two parts.

    layers: k, in the order in which blocks run; None: half of them.  above: the rule of what has
    gradients.  rate: of what is probed, times lr.
    """

    honours: ClassVar[frozenset[str]] = frozenset({"rounding", "groups"})
    why: ClassVar[Mapping[str, str]] = {
        **ZerothOrder.why,
        **dict.fromkeys(("gradient", "gradients"), "a part of what trains has no gradient"),
        "around_step": "a part of the step is evaluations, which nothing can stand around",
        "objective": "gradients and probes are of the task's loss alone",
        "schedule": "the number of a block alone decides what goes without a gradient"}
    rates_probes: ClassVar[bool] = False
    reads_model: ClassVar[bool] = True

    layers: int | None = None
    above: Rule = field(default_factory=AdamW)
    rate: float = 1e-3
    name: str = "zo_fo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and self.layers < 1:
            raise RecipeError(f"{self.name}: layers is at least 1, or None for half of the blocks, "
                              f"got {self.layers}; with no block to probe, leave {self.name} out")
        if self.rate <= 0:
            raise RecipeError(f"{self.name}: what is probed moves at a positive multiple of lr, "
                              f"got {self.rate:g}")
        if self.rule is not None or self.unit != "whole" or self.conservative:
            raise RecipeError(f"{self.name}: what is probed goes by plain descent, all together")

    def make(self, groups: list[dict[str, Any]], plan: Plan, seed: int) -> HybridOptimizer:
        return HybridOptimizer(groups, self, plan, seed)


class HybridOptimizer(ZooOptimizer):
    """See the module. `model` and `blocks` must be set.

    State of a parameter: what its rule keeps, and ``step``; nothing below block k.
    """

    spec: Hybrid

    def __init__(self, groups: list[dict[str, Any]], spec: Hybrid, plan: Plan, seed: int):
        super().__init__(groups, spec, plan, seed)
        self.below: frozenset[str] | None = None     # names of what is probed
        self._border: nn.Module | None = None        # the last block below

    def units(self) -> Sequence[frozenset[str] | None]:
        return (self.below,)

    def _rates(self, update: int) -> list[float]:
        return [lr * self.spec.rate for lr in super()._rates(update)]

    def passes(self) -> Generator[Evaluate, float, float]:
        if self.model is None or not self.blocks:
            raise ConfigError(f"{self.spec.name} reads in which order the blocks of a model run: "
                              "use tuned.step(batch), or set optimizer.model and optimizer.blocks")
        if processes() > 1:
            raise ConfigError(f"{self.spec.name} makes gradients that {processes()} processes do "
                              "not share; use one process, or mezo")
        if self.below is None:
            callers = Callers(self.model, self._all())
            yield Evaluation(callers.watch(), self.model)
            self._split(callers)
            self._callers = callers
        every = [p for _, p in self._all()]
        for p in every:
            p.grad = None
        try:
            loss = yield Evaluation(self._with_graph(), self.model)
            if not math.isfinite(loss):
                raise NotFinite(self.spec.name, loss)
            yield from super().passes()
            self._descend(self.param_groups[0]["updates"] - 1)
        finally:
            for p in every:
                p.grad = None
        return loss

    def _split(self, callers: Callers) -> None:
        order = [p for p in callers.called if p in set(self.blocks)]
        k = len(order) // 2 if self.spec.layers is None else self.spec.layers
        if not 1 <= k <= len(order):
            raise RecipeError(f"{self.spec.name}: {k} blocks are to be probed, and {len(order)} "
                              "run in this model; expected at least 1 and no more than run")
        end = callers.called[order[k]] if k < len(order) else self._after(callers, order[-1])
        below = frozenset(n for n, at in callers.first.items() if at < end)
        names = {n for n, _ in self._all()}
        if not below:
            raise RecipeError(f"{self.spec.name}: nothing trains in the first {k} blocks or before "
                              f"them, so nothing is probed; leave {self.spec.name} out, or name "
                              "weights there with targets")
        if below >= names:
            raise RecipeError(f"{self.spec.name}: nothing trains behind the first {k} of "
                              f"{len(order)} blocks, so nothing has a gradient; take fewer layers, "
                              "or mezo")
        self.below, self._border = below, self.model.get_submodule(order[k - 1])

    @staticmethod
    def _after(callers: Callers, last: str) -> int:
        """When the first module runs that is no part of the last block."""
        inside = f"{last}."
        return next((at for path, at in callers.called.items()
                     if at > callers.called[last] and not path.startswith(inside)),
                    len(callers.called))

    def _with_graph(self) -> Evaluate:
        return Above(self.model, self._border, [p for n, p in self._all() if n in self.below],
                     self.training, self._leaks)

    def _leaks(self) -> None:
        raise RecipeError(f"{self.spec.name}: something that trains behind the first blocks is "
                          "also read below, so that backward would go through them; take other "
                          "targets, or mezo")

    def _read(self, value: Any) -> float:
        loss = super()._read(value)
        if isinstance(value, Tensor) and torch.is_grad_enabled():
            if not value.requires_grad:
                raise RecipeError(f"{self.spec.name}: the loss depends on nothing that trains "
                                  "behind the first blocks, so nothing has a gradient; take fewer "
                                  "layers, or mezo")
            if math.isfinite(loss):
                value.backward()
        elif torch.is_grad_enabled():
            raise ConfigError(f"{self.spec.name}: the loss is a {type(value).__name__} and has no "
                              "gradient; expected a tensor")
        return loss

    @torch.no_grad()
    def _descend(self, update: int) -> None:
        """The tensors with a gradient along what the rule makes of it."""
        seed = fold("round", self.seed, update) & 0x7FFFFFFF
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if name not in self.below and p.grad is not None:
                    self._along(name, p, _slices(p), self.spec.above, group["lr"],
                                group["weight_decay"], seed, update)

    def replay(self, log: ScalarLog) -> None:
        raise FormatError(f"a log repeats what was probed, and {self.spec.name} moves a part of "
                          "the weights by gradients, which it does not hold; resume from a "
                          "checkpoint")


def _slices(p: nn.Parameter) -> Callable[[int, int, torch.dtype], Tensor]:
    """(lo, hi, dtype) -> those entries of its gradient, in the order they lie in memory."""
    flat = in_memory_order(p.grad, like=p)[0].reshape(-1)
    return lambda lo, hi, dtype: flat[lo:hi].to(dtype, copy=True)


class Above(AbstractContextManager[None]):
    """One forward whose graph begins behind `border`, in the mode the model trains in."""

    def __init__(self, model: nn.Module, border: nn.Module, below: Sequence[nn.Parameter],
                 training: bool, leaks: Callable[[], None]):
        self.model, self.border, self.below = model, border, below
        self.training, self.leaks, self.stack = training, leaks, ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            modes = [(m, m.training) for m in self.model.modules()]
            stack.callback(lambda: [setattr(m, "training", was) for m, was in modes])
            if self.training:
                self.model.train()
            for p in self.below:
                p.requires_grad_(False)
                stack.callback(p.requires_grad_, True)
            stack.callback(self.border.register_forward_hook(self._look).remove)
            stack.enter_context(torch.enable_grad())
            self.stack = stack.pop_all()

    def _look(self, _m: Any, _a: Any, out: Any) -> None:
        if any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(out)):
            self.leaks()

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
