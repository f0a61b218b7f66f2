"""How far pictures that are made from a public encoder alone mislead what was tuned from it.

    delta <- clip(delta + 2.5 budget / steps * sign(d distance / d delta), -budget, budget)

with ``x + delta`` kept to what a picture can be. Whoever has the base, and neither the tuned
weights nor their head, moves the features that the base's head would read away from what they were,

    distance = sum over rows of ||f(x + delta) - f(x)||^2

(projected gradient ascent, Towards Deep Learning Models Resistant to Adversarial Attacks, 2018,
arXiv:1706.06083, on features as in Task-generalizable Adversarial Attack based on Perceptual
Metric, 2018, arXiv:1811.09020). Beside it stand random signs of the same size, which is what any
change of this size does, and the same ascent by one who has the tuned model, on the loss against
what it answers. The budget is of pixels from 0 to 1; the model's own are normalised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import CheckError, ConfigError
from ..core.needs import head_linear
from .tasks import evaluate

#: what pictures are made by, in the order of a report
WAYS = ("clean", "random", "encoder", "whole")


@dataclass(frozen=True)
class Box:
    """budget, low, high: of a picture as the model reads it, one number a channel (C, 1, 1)."""

    budget: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, budget: float, mean: Tensor, std: Tensor) -> Box:
        """Of pixels from 0 to 1 that are read as ``(x - mean) / std``."""
        return cls(budget / std, -mean / std, (1 - mean) / std)

    def inside(self, x: Tensor, delta: Tensor) -> Tensor:
        """The nearest delta of the budget with which x is a picture."""
        low, high, most = (t.to(x) for t in (self.low, self.high, self.budget))
        delta = torch.maximum(torch.minimum(delta, most), -most)
        return torch.maximum(torch.minimum(x + delta, high), low) - x


def random_signs(x: Tensor, box: Box, generator: torch.Generator) -> Tensor:
    """delta: every pixel by the whole budget, up or down."""
    sign = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    return box.inside(x, sign * box.budget.to(x))


def ascend(x: Tensor, value: Callable[[Tensor], Tensor], box: Box, steps: int,
           generator: torch.Generator) -> Tensor:
    """delta after so many steps up `value`, a number of x + delta, from a random start (where
    delta is 0 a distance has no gradient)."""
    most = box.budget.to(x)
    delta = box.inside(x, (torch.rand(x.shape, generator=generator).to(x) * 2 - 1) * most)
    for _ in range(steps):
        at = (x + delta).requires_grad_(True)
        with torch.enable_grad():
            (g,) = torch.autograd.grad(value(at), at)
        if not bool(g.isfinite().all()):
            raise CheckError("the gradient of an attack is not finite")
        delta = box.inside(x, delta + 2.5 * most / steps * g.sign())
    return delta


class Attacked(nn.Module):
    """A tuned model that reads pictures which were moved first. way: one of :data:`WAYS`."""

    def __init__(self, tuned: Any, way: str, box: Box, steps: int, seed: int):
        super().__init__()
        self.held, self.way, self.box, self.steps = [tuned], way, box, steps
        self.draw = torch.Generator().manual_seed(seed)
        head = head_linear(tuned.anatomy)
        if head is None:
            raise ConfigError("an attack moves what one linear head reads, and "
                              f"{type(tuned.model).__name__} has no such head")
        self.head = tuned.model.get_submodule(head.path)

    def forward(self, pixel_values: Tensor, **others: Any) -> Any:
        (tuned,), x = self.held, pixel_values
        if self.way != "clean":
            x = x + self.delta(x, others)
        return tuned.model(pixel_values=x, **others)

    def delta(self, x: Tensor, others: Mapping[str, Any]) -> Tensor:
        if self.way == "random":
            return random_signs(x, self.box, self.draw)
        (tuned,) = self.held
        if self.way == "whole":
            with torch.no_grad():
                said = tuned.model(pixel_values=x, **others).logits.argmax(-1)
            return ascend(x, lambda at: F.cross_entropy(
                tuned.model(pixel_values=at, **others).logits.double(), said, reduction="sum"),
                self.box, self.steps, self.draw)
        with tuned.disabled():
            with torch.no_grad():
                before = self.features(x, others)
            return ascend(x, lambda at: (self.features(at, others) - before).square().sum(),
                          self.box, self.steps, self.draw)

    def features(self, x: Tensor, others: Mapping[str, Any]) -> Tensor:
        """What the head is given, (rows, ...)."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.held[0].model(pixel_values=x, **others)
        finally:
            hook.remove()
        return seen[-1]


def audit(tuned: Any, task: Any, split: str, *, budget: float, steps: int = 10, seed: int = 0,
          batch: int = 64) -> dict[str, dict[str, float]]:
    """way -> the task's figures on a split. tuned: a handle whose base is the public encoder.

    Raises ConfigError for a budget that is no share, and for what is no classifier of pictures.
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"a budget is of pixels from 0 to 1: above 0 and up to 1, not {budget:g}")
    if steps < 1:
        raise ConfigError(f"an attack takes a step or more, not {steps}")
    box = Box.of(budget, *scale(task))
    found = {}
    with still(tuned.model):
        for way in WAYS:
            found[way] = evaluate(Attacked(tuned, way, box, steps, seed).eval(), task, split, batch)
    return found


def scale(task: Any) -> tuple[Tensor, Tensor]:
    """(mean, std), (C, 1, 1) each, by which a task's pictures are normalised."""
    if tuple(task.takes) != ("image",) or task.data.task != "image-classification":
        raise ConfigError("an attack moves the pictures of a classifier, and this is "
                          f"{task.data.task}")
    own = task.processor
    mean, std = (getattr(own, n, None) or getattr(own, f"image_{n}", None)
                 for n in ("mean", "std"))
    if not getattr(own, "do_normalize", True) or mean is None or std is None:
        mean, std = [0.0], [1.0]
    return tuple(torch.tensor(list(t), dtype=torch.float64).view(-1, 1, 1)  # type: ignore
                 for t in (mean, std))


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, as it was afterwards."""
    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, training in was.items():
            m.training = training
