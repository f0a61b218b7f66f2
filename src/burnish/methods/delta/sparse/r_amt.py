from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ....blocks.update.noise import fold
from ....blocks.weight.binary import Binary, Bits
from ....core.draw import drawn
from ....core.errors import RecipeError
from ....core.events import LATE
from ....core.method import Method, setting
from ....core.site import Place, Site
from ...objective.distill import from_reference

if TYPE_CHECKING:
    from ....core.protocols import Pass
    from ....engine.tuned import Tuned

#: keeps 0 / 0 away, and is small beside the smallest gradients
EPS = 1e-30


@dataclass(frozen=True, kw_only=True)
class RAmt(Method):
    """R-AMT: binary masks on frozen attention weights; what the base would have said decides which
    parts of the task's gradient count.

        W' = W * 1[m > cut]          dm = dW' * W           (straight through the step)
        a = d loss / dm      k = d T^2 KL(base || model) / dm
        P = 1/2 (1 + sign(a) (a + k) / (|a| + |k| + eps))
        gradient = ((1 - alpha) + alpha 1[P > U]) a               U uniform in [0, 1)

    m (out, in) on the projections of attention (``targets="vision_model*self_attn*"``: those of an
    image encoder alone). k is never applied: where both gradients agree P = 1, where they differ
    the larger decides more often, and a mean gradient is P a. T is `temperature`. The logits are
    those of the model's outputs, its reference the model without the adapter on the same batch.

    Start: m = 0.01, so every mask is one, the pre-trained function exactly. Trains out in scores
    per matrix, in fp32; a file that answers has one bit each (``tuned.save``; with ``whole=True``
    the scores too, to train on). Merges exactly: ``W`` with zeros. Kept for backward: x; W' is
    formed anew. k waits during the task's pass, one more copy of the gradients. Costs a second
    forward and backward and the base's forward, per micro-batch, on the same rows with the same
    dropout: the passes are made one by one, so nothing has to be held for two of them.

    An update of Adam moves m by its rate at most: at the published 8e-5 the first mask falls
    after 63 updates. m in half precision would not move at all. No weight decay on m.

    Our reading: T = 1, which the text does not give. With several micro-batches to an update each
    has its own decision, and so has each process.
    """

    paper: ClassVar[str] = "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained " \
                           "Vision-Language Models, ICCV 2023, arXiv:2307.15049"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "gradients")
    excused: ClassVar[dict[str, str]] = {
        "every_kind_of_place": "it has targets of its own, attention, so those of a recipe name "
                               "nothing for it; tests/methods/test_r_amt.py has linears, Conv1D, "
                               "rows of a fused weight and nn.MultiheadAttention"}

    targets: str | list[str] | tuple[str, ...] | None = setting(
        "attention", "which weights, text or a list; None takes the recipe's")
    alpha: float = setting(1.0, "lambda, the share of a gradient that is decided about",
                           other=(0.5,))
    temperature: float = setting(1.0, "T, softens both distributions", alias=("T",))
    cut: float = setting(5e-3, "scores above it are ones", alias=("threshold",))
    init: float = setting(1e-2, "of all scores")
    seed: int = setting(0, "of U")
    stored: bool = setting(False, "masks of a file, one bit each, as training leaves them",
                           unseen="these come from a file: tests/methods/test_r_amt.py")

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.temperature <= 0:
            raise RecipeError(f"{self}: 0 < alpha <= 1 and a positive temperature are expected")
        if not self.init > self.cut:
            raise RecipeError(f"{self}: expected an init above the cut: every mask is one at "
                              "the start")

    def finished(self) -> RAmt:
        return replace(self, stored=True)

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Binary | Bits:
        if not self.stored:
            return Binary(site.weight.shape, self.init, self.cut)
        if not site.blank:
            raise RecipeError("r_amt(stored=True) has the masks of a saved adapter; leave it out "
                              "to train new ones")
        return Bits(site.weight.shape)

    def controller(self, tuned: Tuned) -> Decided | None:
        masks = {id(t.m) for _, t in tuned.terms(Binary)}
        return Decided(self, masks, partial(from_reference, tuned)) if masks else None

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return 0 if self.stored else place.out * place.inp


class Decided:
    """The gradient of the scores, where it counts. Late: what others change comes before."""

    phase: ClassVar[int] = LATE

    def __init__(self, method: RAmt, masks: set[int], kl: Any):
        self.method, self.masks, self.kl = method, masks, kl
        self.at: tuple[int, int] | None = None       # the last pass: of which update, which of it

    def around_step(self, step: Pass) -> Iterator[None]:
        mine = {n: p for n, p in step.parameters().items() if id(p) in self.masks}
        k = step.probe(of=lambda run: self.kl(run, self.method.temperature)).grads
        waiting = {n: p.grad for n, p in mine.items()}
        for p in mine.values():
            p.grad = None                        # what is there after the pass is the pass's own
        yield
        update, nth = self.at or (None, 0)
        self.at = (step.index, nth + 1 if update == step.index else 0)
        with drawn(fold(self.method.seed, *self.at)):
            for n, p in mine.items():
                if p.grad is not None and n in k:
                    counts(p.grad, k.pop(n), self.method.alpha)
                if (before := waiting[n]) is not None:
                    p.grad = before if p.grad is None else before.add_(p.grad)


def probability(a: Tensor, k: Tensor) -> Tensor:
    """P of the task's gradient and the divergence's."""
    return (1 + a.sign() * (a + k) / (a.abs() + k.abs() + EPS)) / 2


def counts(a: Tensor, k: Tensor, alpha: float) -> None:
    """``a <- ((1 - alpha) + alpha 1[P > U]) a``, U drawn as a is shaped."""
    out = probability(a, k) <= torch.rand_like(a)
    a.sub_(alpha * a.masked_fill(~out, 0))
