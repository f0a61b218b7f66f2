"""Several adapters of one model, one a task, and what is known of the features under each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import call, moved
from ..core.errors import RecipeError
from ..engine.stages import divides
from ..engine.tuned import Tuned
from .learner import Study


def check_alone(study: Study, name: str) -> None:
    """Refuse recipes of which there cannot be one a task: those that divide a run themselves, and
    those that hold the base in a form of their own choosing."""
    if (part := divides(study.recipe)) is not None:
        raise RecipeError(f"{part.name} divides a run over its tasks, and so does {name}: leave it "
                          "out")
    held = [m.name for m in study.recipe if "storage" in m.axes()]
    if held:
        raise RecipeError(f"{held[0]} holds the base's weights for all adapters, and {name} adds "
                          "one for each task with the same recipe: leave it out")


def added(tuned: Tuned, adapter: str) -> dict[str, nn.Parameter]:
    """Tensors that an adapter has added and trains, by names that are the same for every
    adapter of its recipe."""
    mark = f".burnish.{adapter}."
    return {f".{n}".replace(mark, ".burnish.*.")[1:]: p for n, p in tuned.model.named_parameters()
            if mark in f".{n}" and not getattr(p, "burnish_frozen", False)}


@torch.no_grad()
def mean_of(sets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over several adapters."""
    return {n: torch.stack([s[n].detach() for s in sets]).mean(0) for n in sets[0]}


def linear_head(tuned: Tuned, name: str) -> str:
    """Path of the head, which has to be one linear layer; its input are the features."""
    paths = [p for p in tuned.anatomy.head if isinstance(tuned.model.get_submodule(p), nn.Linear)]
    if len(tuned.anatomy.head) != 1 or len(paths) != 1:
        raise RecipeError(f"{name} reads the features that enter a linear head, and the head of a "
                          f"{type(tuned.model).__name__} is "
                          f"{', '.join(tuned.anatomy.head) or 'none'}")
    return paths[0]


class Features:
    """What enters the head, in the forwards made meanwhile."""

    def __init__(self, head: nn.Module):
        self.head, self.last = head, torch.empty(0)

    def _see(self, module: nn.Module, args: Any) -> None:
        self.last = args[0]

    @contextmanager
    def seen(self) -> Iterator[Features]:
        handle = self.head.register_forward_pre_hook(self._see)
        try:
            yield self
        finally:
            handle.remove()

    @torch.no_grad()
    def of(self, tuned: Tuned, inputs: Any) -> Tensor:
        """(rows, width) of a batch under what is in use, in evaluation, in float32 or wider."""
        tuned.model.eval()
        with self.seen():
            call(tuned.model, moved(inputs, next(self.head.parameters()).device))
        out = self.last
        if out.dim() != 2:
            raise RecipeError(f"the head is given {tuple(out.shape)}, where (rows, features) was "
                              "expected")
        return out.to(torch.promote_types(out.dtype, torch.float32))


@dataclass
class Gaussians:
    """Per class the mean and the covariance of features (+ `ridge` on its diagonal), to draw from.

    diagonal: variances alone.
    """

    ridge: float = 1e-4
    diagonal: bool = False
    mean: dict[int, Tensor] = field(default_factory=dict)
    spread: dict[int, Tensor] = field(default_factory=dict)

    def learn(self, label: int, features: Tensor) -> None:
        x = features.double()
        self.mean[label] = x.mean(0)
        off = x - self.mean[label]
        n = max(1, len(x) - 1)
        self.spread[label] = off.square().sum(0) / n + self.ridge if self.diagonal else \
            off.t() @ off / n + self.ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def draw(self, label: int, n: int, generator: torch.Generator) -> Tensor:
        """(n, width) features of a class."""
        mean, spread = self.mean[label], self.spread[label]
        z = torch.randn(n, len(mean), generator=generator, dtype=mean.dtype).to(mean.device)
        root = spread.sqrt() if self.diagonal else torch.linalg.cholesky(spread)
        return (mean + (z * root if self.diagonal else z @ root.t())).float()

    def tensors(self) -> list[Tensor]:
        return [*self.mean.values(), *self.spread.values()]


def nearest_to_centres(features: Tensor, k: int, generator: torch.Generator,
                       rounds: int = 25) -> list[int]:
    """k rows (all where there are fewer), each the nearest to one centre of Lloyd's k-means that
    no other centre has taken."""
    if len(features) <= k:
        return list(range(len(features)))
    x = features.double()
    centres = x[torch.randperm(len(x), generator=generator)[:k]]
    for _ in range(rounds):
        of = torch.cdist(x, centres).argmin(1)
        new = torch.stack([x[of == c].mean(0) if (of == c).any() else centres[c]
                           for c in range(k)])
        if torch.equal(new, centres):
            break
        centres = new
    taken: list[int] = []
    far = torch.cdist(centres, x)
    for c in range(k):
        order = far[c].argsort().tolist()
        taken.append(next(i for i in order if i not in taken))
    return sorted(taken)
