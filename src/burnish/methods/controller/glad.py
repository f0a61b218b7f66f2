from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...core.errors import RecipeError
from ...core.method import Method, setting
from .sam import Sharpness

if TYPE_CHECKING:
    from ...core.protocols import Pass, Tuned


@dataclass(frozen=True, kw_only=True)
class Glad(Method):
    """GLAD: a gradient that also falls in length, so that few examples do not end in sharp minima.

        g = dL(w)      g' = (1 - kappa) g + kappa dL(w + rho g / ||g||)

    The first-order form of a penalty on ||dL||: on a quadratic of Hessian H, ``g' = (I + kappa rho
    H / ||g||) g``. kappa = 1 is SAM, which is there by that name. Written beside what trains, as
    ``lora(rank=16, targets="q,k,v") + glad``. (unconfirmed: that this is the paper's regulariser,
    its rho and kappa; no code is public.)

    The norm is over all trained tensors together: with B = 0 it is that of dB. Start: what stands
    beside it. A second forward and backward per micro-batch, on the same rows with the same
    dropout; kept during it: one copy of the trained tensors and one of their gradients. w comes
    back bit for bit. Under accumulation, and in each process, a micro-batch has a step of its own;
    a loss scale cancels in it.
    """

    paper: ClassVar[str] = "GLAD: Generalizable Tuning for Vision-Language Models (2025)"
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "gradients")

    radius: float = setting(0.05, "rho, how far away the gradient is taken")
    kappa: float = setting(0.5, "share of the gradient that is taken there")

    def __post_init__(self) -> None:
        if not 0 < self.radius < float("inf"):
            raise RecipeError(f"glad: radius is a positive length, got {self.radius}")
        if not 0 < self.kappa < 1:
            raise RecipeError(f"glad: kappa={self.kappa}: expected a share between 0 and 1; 0 is "
                              "the recipe without glad, 1 is sam")

    def claims(self) -> tuple[str, ...]:
        return ("where the gradient is taken",)

    def controller(self, tuned: Tuned) -> Mixed:
        return Mixed(self.name, self.radius, self.kappa)


class Mixed(Sharpness):
    """The gradient of both passes."""

    def __init__(self, name: str, radius: float, kappa: float):
        super().__init__(name, radius)
        self.kappa = kappa

    def around_step(self, step: Pass) -> Iterator[None]:
        params, first = step.parameters(), step.probe(statistics=True).grads
        waiting = {n: p.grad for n, p in params.items()}
        for p in params.values():
            p.grad = None                        # what is there after the pass is the pass's own
        yield from self.passed(step, {n: g.clone() for n, g in first.items()})
        for name, p in params.items():
            g, there = first.pop(name, None), p.grad
            if g is not None:
                g.mul_(1 - self.kappa)
                p.grad = g if there is None else g.add_(there, alpha=self.kappa)
            if (before := waiting[name]) is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)
