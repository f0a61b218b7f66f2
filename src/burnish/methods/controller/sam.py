from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...blocks.update.elsewhere import ascent, elsewhere
from ...core.errors import CheckError, RecipeError
from ...core.events import LATE
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.protocols import Pass, Tuned

#: of |w| + ETA, the relative length of a step, as published
ETA = 0.01


@dataclass(frozen=True, kw_only=True)
class Sam(Method):
    """SAM: the gradient is taken where the loss is highest nearby, so that minima become flat.

        g = dL(w)      e = rho g / ||g||      w <- update of w with dL(w + e)

    The norm is over all trained tensors together. ``adaptive`` measures lengths against the
    weights, which makes the step independent of their scale (ASAM; rho about ten times as large):

        e = rho T^2 g / ||T g||,   T = |w| + 0.01

    Start: the pre-trained function. Trains what stands beside it. A second forward and backward
    per micro-batch, on the same rows with the same dropout; kept during it: one copy of the
    trained tensors (nothing else; g is used up). w comes back bit for bit. Running statistics
    are those of the pass at w.

    Under accumulation each micro-batch has its own e, and so has each process: the whole batch's
    would need every micro-batch twice and all of them kept, and the paper finds that e of fewer
    samples generalises better (its m-sharpness). A loss scale cancels in e; a gradient that is
    zero or not finite moves nothing. Objectives are part of L. In half precision a step below a
    weight's spacing is nothing, and a first pass that moves no weight at all is an error.

    Departure: T is |w| + 0.01 for every tensor; the authors' code leaves biases at 1.
    """

    paper: ClassVar[str] = ("Sharpness-Aware Minimization for Efficiently Improving "
                            "Generalization, ICLR 2021; ASAM: Adaptive Sharpness-Aware "
                            "Minimization, ICML 2021")
    tier: ClassVar[str] = "checked against an independent equation"
    relies_on: ClassVar[tuple[str, ...]] = ("around_step",)
    excused: ClassVar[dict[str, str]] = {
        "loss_falls on clip":
            "by chance: a contrast of two pairs begins near a saddle, where a radius reaches past "
            "what a few steps move; tests/methods/test_sam.py has its equation"}

    radius: float = setting(0.05, "rho, how far away the gradient is taken")
    adaptive: bool = setting(False, "lengths relative to the weights (ASAM); try radius=0.5")

    def __post_init__(self) -> None:
        if not 0 < self.radius < float("inf"):
            raise RecipeError(f"sam: radius is a positive length, got {self.radius}")

    def claims(self) -> tuple[str, ...]:
        return ("where the gradient is taken",)

    def controller(self, tuned: Tuned) -> Sharpness:
        return Sharpness(self.name, self.radius, ETA if self.adaptive else None)


class Sharpness:
    """Late, so that whatever else stands around a pass has chosen what trains."""

    phase: ClassVar[int] = LATE

    def __init__(self, name: str, radius: float, eta: float | None = None):
        self.name, self.radius, self.eta, self.looked = name, radius, eta, False

    def around_step(self, step: Pass) -> Iterator[None]:
        yield from self.passed(step, step.probe(statistics=True).grads)

    def passed(self, step: Pass, grads: dict[str, Tensor]) -> Iterator[None]:
        """The pass at ``w + e``; `grads` are those at w, and used up."""
        params = step.parameters()
        steps = ascent(params, grads, self.radius, self.eta)
        asked = not self.looked and any(map(_nonzero, steps.values()))
        with step.unmoved(), elsewhere(params, steps) as kept:
            if asked:
                self._look(params, kept)
            yield

    def _look(self, params: dict[str, Any], kept: dict[str, Tensor]) -> None:
        self.looked = True
        if all(torch.equal(params[n], was) for n, was in kept.items()):
            raise CheckError(f"{self.name}: radius={self.radius} moves no weight: a step is below "
                             "the spacing of every trained tensor's dtype; keep what trains in "
                             "fp32, or take a larger radius")


def _nonzero(step: Tensor) -> bool:
    return not isinstance(step, FakeTensor) and bool(step.any())
