"""Inner rules: how a gradient becomes a direction, element by element.

A rule is pure arithmetic on one slice: it knows neither how its state is stored (codecs), nor in
what basis the slice lives (subspace), nor when it runs or how the weight is rounded (step). Because
every rule here is element-wise, a tensor may be stepped in slices of any size, which is what keeps
temporaries small.

    u = rule.direction(g, state, t, group)        then        W <- W - lr * u

``g`` is scratch in the dtype of the step, which the rule may overwrite, ``state`` holds the slice
of each named state and is changed in place, ``t`` counts from 1 and is a Python int (nothing here
reads a tensor's value, so steps run on fake tensors), ``group`` is the optimizer's param group with
the hyperparameters.

That is all a rule needs. One that also has ``move`` takes the whole step, decay included, of
several slices with a few kernels for all; the rules here do, most of them in one pass::

    rule.move(xs, gs, states, t, group, lr, decay)     # xs and states in place, gs as they are
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Rule(Protocol):
    """What a rule offers; the fields of a rule are its hyperparameters."""

    name: ClassVar[str]
    #: name of each state -> may it be negative? (codecs choose their map by this)
    states: Mapping[str, bool]
    #: decay multiplies the weight (AdamW, Lion); False adds it to the gradient (SGD)
    decoupled: ClassVar[bool]

    def hyper(self) -> dict[str, Any]: ...

    def direction(self, g: Tensor, state: Mapping[str, Tensor], t: int,
                  group: Mapping[str, Any]) -> Tensor: ...


class _Hyper:
    def hyper(self) -> dict[str, Any]:
        """Hyperparameters as they enter the param groups (schedulers may change them there)."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Zero states in the accumulation dtype of `like` (fp32, or fp64 for fp64)."""
        return {k: torch.zeros_like(like, dtype=accumulator(like.dtype))
                for k in self.states}  # type: ignore[attr-defined]


#: device types whose fused kernels torch ships
FUSED = frozenset(("cpu", "cuda", "mps", "xpu", "hpu"))


def move(rule: Rule, xs: list[Tensor], gs: list[Tensor], states: Mapping[str, list[Tensor]],
         t: int, group: Mapping[str, Any], lr: float, decay: float) -> None:
    """``x <- (1 - lr decay) x - lr u`` for every slice (where the rule has it so, ``decay x`` is
    added to g instead): all at once where the rule can, else one by one by its direction."""
    if hasattr(rule, "move") and xs[0].device.type in FUSED:
        return rule.move(xs, gs, states, t, group, lr, decay)
    for i, x in enumerate(xs):
        g = gs[i].clone()
        if decay and not rule.decoupled:
            g.add_(x, alpha=decay)
        u = rule.direction(g, {s: states[s][i] for s in states}, t, group)
        if decay and rule.decoupled:
            x.mul_(1 - lr * decay)
        x.add_(u, alpha=-lr)
    return None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a step is computed: fp64 for fp64 weights, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class AdamW(_Hyper):
    """Adam with decoupled decay (Loshchilov and Hutter, 2019).

        m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    eps_first: GaLore's form, ``u = sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)``: eps enters
    before the correction of bias, so it is larger by 1 / sqrt(1 - b2^t).
    """

    name: ClassVar[str] = "adamw"
    states: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    decoupled: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    eps_first: bool = False

    def direction(self, g: Tensor, state: Mapping[str, Tensor], t: int,
                  group: Mapping[str, Any]) -> Tensor:
        b1, b2 = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        c1, c2 = 1 - b1**t, math.sqrt(1 - b2**t)
        u = torch.sqrt(v, out=g)
        if group["eps_first"]:
            u.add_(group["eps"])
            return torch.div(m, u, out=u).mul_(c2 / c1)
        u.div_(c2).add_(group["eps"])
        return torch.div(m, u, out=u).div_(c1)

    def correction(self, t: int, group: Mapping[str, Any]) -> float:
        """The factor for the bias of the moments where it can be taken out of u, else 1."""
        b1, b2 = group["betas"]
        return math.sqrt(1 - b2**t) / (1 - b1**t) if group["eps_first"] else 1.0

    def move(self, xs: list[Tensor], gs: list[Tensor], states: Mapping[str, list[Tensor]], t: int,
             group: Mapping[str, Any], lr: float, decay: float) -> None:
        """Torch's fused kernel: one pass. With eps_first it is given eps / sqrt(1 - b2^t)."""
        b1, b2 = group["betas"]
        eps = group["eps"] / (math.sqrt(1 - b2**t) if group["eps_first"] else 1.0)
        step = torch.full((), float(t), dtype=torch.float32, device=xs[0].device)
        torch._fused_adamw_(xs, gs, states["exp_avg"], states["exp_avg_sq"], [], [step] * len(xs),
                            lr=lr, beta1=b1, beta2=b2, weight_decay=decay, eps=eps,
                            amsgrad=False, maximize=False)


@dataclass(frozen=True, kw_only=True)
class Lion(_Hyper):
    """The sign of an interpolated momentum (Chen et al., 2023).

        u = sign(b1 m + (1 - b1) g)      then      m <- b2 m + (1 - b2) g
    """

    name: ClassVar[str] = "lion"
    states: ClassVar[Mapping[str, bool]] = {"exp_avg": True}
    decoupled: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def direction(self, g: Tensor, state: Mapping[str, Tensor], t: int,
                  group: Mapping[str, Any]) -> Tensor:
        b1, b2 = group["betas"]
        m = state["exp_avg"]
        u = torch.lerp(g, m, b1).sign_()
        m.lerp_(g, 1 - b2)
        return u

    def move(self, xs: list[Tensor], gs: list[Tensor], states: Mapping[str, list[Tensor]], t: int,
             group: Mapping[str, Any], lr: float, decay: float) -> None:
        """Four passes over what lies in cache; one temporary of the slices' size."""
        b1, b2 = group["betas"]
        ms = states["exp_avg"]
        us = torch._foreach_lerp(gs, ms, b1)
        torch._foreach_sign_(us)
        torch._foreach_lerp_(ms, gs, 1 - b2)
        if decay:
            torch._foreach_mul_(xs, 1 - lr * decay)
        torch._foreach_add_(xs, us, alpha=-lr)


@dataclass(frozen=True, kw_only=True)
class Sign(_Hyper):
    """``u = sign(g)``; no state."""

    name: ClassVar[str] = "sign"
    states: ClassVar[Mapping[str, bool]] = {}
    decoupled: ClassVar[bool] = True

    weight_decay: float = 0.0

    def direction(self, g: Tensor, state: Mapping[str, Tensor], t: int,
                  group: Mapping[str, Any]) -> Tensor:
        return g.sign_()


@dataclass(frozen=True, kw_only=True)
class SGD(_Hyper):
    """``b <- mu b + g``, ``u = b`` (``g + mu b`` with nesterov); no state when mu = 0.

    Decay is added to the gradient, as in `torch.optim.SGD`; inside a subspace, where the gradient
    has another shape than the weight, it multiplies the weight (the same when mu = 0).
    """

    name: ClassVar[str] = "sgd"
    decoupled: ClassVar[bool] = False

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def states(self) -> Mapping[str, bool]:
        return {"momentum_buffer": True} if self.momentum else {}

    def direction(self, g: Tensor, state: Mapping[str, Tensor], t: int,
                  group: Mapping[str, Any]) -> Tensor:
        if "momentum_buffer" not in state:
            return g
        b = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
        return g.add_(b, alpha=group["momentum"]) if group["nesterov"] else g.copy_(b)

    def move(self, xs: list[Tensor], gs: list[Tensor], states: Mapping[str, list[Tensor]], t: int,
             group: Mapping[str, Any], lr: float, decay: float) -> None:
        """Torch's fused kernel: one pass."""
        buffers = states.get("momentum_buffer", [])
        torch._fused_sgd_(xs, gs, buffers, lr=lr, weight_decay=decay, dampening=0.0,
                          momentum=group["momentum"] if buffers else 0.0,
                          nesterov=bool(buffers) and group["nesterov"], maximize=False,
                          is_first_step=False)


Rows = Callable[[int, int], Tensor]


class Whole(_Hyper):
    """A rule that looks at a whole tensor at once (factored moments, norms): answer two questions.

    shapes: the shape of the gradient -> the shape of each state, by name; which names there are
        depends on the number of its dimensions alone.
    update: (G, W, state, t, group) -> u, with G a matrix (first dimension in memory, rest), or a
        vector for one-dimensional tensors, W the weight in the same form (not to be changed), both
        in the accumulation dtype; ``W <- W - lr u`` follows. G may be overwritten.

    A rule that need not hold u whole answers ``rows`` instead of ``update``. One that also has
    ``together(Gs, Ws, states, t, group)``, a list of u, steps many small tensors of as many
    dimensions with few calls; none of what it is given but the states is its to change.
    """

    name: ClassVar[str] = "whole"
    decoupled: ClassVar[bool] = True

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def update(self, G: Tensor, W: Tensor, state: Mapping[str, Tensor], t: int,
               group: Mapping[str, Any]) -> Tensor:
        raise NotImplementedError

    def rows(self, G: Tensor, weight: Rows, state: Mapping[str, Tensor], t: int,
             group: Mapping[str, Any]) -> Rows:
        """(lo, hi) -> those rows of u, in the accumulation dtype and read only. Each row is asked
        for once, in order, and W is stepped behind it.

        G: the gradient as it came, not to be changed.  weight: (lo, hi) -> those rows of W.
        """
        u = self.update(G.to(accumulator(G.dtype), copy=True), weight(0, len(G)), state, t, group)
        return lambda lo, hi: u[lo:hi]

    def of(self, name: str) -> Whole:
        """The rule for the tensor of this name, where tensors are told apart."""
        return self

    #: see the class
    together: ClassVar[Callable[..., list[Tensor]] | None] = None

    @property
    def states(self) -> Mapping[str, bool]:
        return {s: True for shape in ((2,), (2, 2)) for s in self.shapes(shape)}

    def direction(self, g: Tensor, state: Mapping[str, Tensor], t: int,
                  group: Mapping[str, Any]) -> Tensor:
        raise TypeError(f"{self.name} steps whole tensors, not slices")
