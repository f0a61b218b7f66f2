from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.prompts import accepts
from ...blocks.state.supervised import supervised
from ...blocks.state.twins import view
from ...core.errors import ConfigError, RecipeError
from ...core.method import INPUT, Method, setting
from ...core.needs import head_linear
from .barlow_twins import pooled

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class SupCon(Method):
    """SupCon: what a head reads of samples of one class is to be near, of others far.

        loss + weight mean_i -1/|P(i)| sum_{p in P(i)} log q_ip
        q_ip = exp(z_i.z_p / temperature) / sum_{a != i} exp(z_i.z_a / temperature)

    z (N, D) what the head reads, at length one, of a batch and (``second_view``) of the batch
    distorted once more, P(i) the other rows of i's class. ``outside=False`` takes the mean over
    P(i) inside the logarithm (L_in), which weighs easy positives more; the authors find it far
    worse (ImageNet, top 1: 67.4 against 78.7).

    Beside what trains the encoder of a classifier, ``lora(rank=8) + supcon``, where a batch has
    several samples of most classes and classes are to stay apart beyond the head (retrieval, new
    classes). When not: many classes in small batches, where a row has its own view alone and the
    loss is SimCLR's; labels that are several a sample or numbers, which are refused. Texts in
    pairs: `burnish fit` with ``loss_type="supcon"``.

    Trains nothing of its own, keeps the states of each view for backward; a forward more for the
    second. Start: the term has a gradient from the first step. The loss is of one process's
    micro-batch. A batch of which no two rows share a class adds 0.

    Departures: a term beside the task's loss where the authors pre-train with it alone and then
    train the head; no projector between features and z; the mean over rows that have a positive,
    without the factor t / 0.07 of the authors' code (unconfirmed); views as barlow_twins has them.
    """

    paper: ClassVar[str] = "Supervised Contrastive Learning, NeurIPS 2020, arXiv:2004.11362"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"linear head"})
    sees_run: ClassVar[bool] = True

    weight: float = setting(1.0, "of the term")
    temperature: float = setting(0.1, "of the softmax over the other rows", other=(1.0,))
    outside: bool = setting(True, "the mean over a row's class is of logarithms, not inside one")
    second_view: bool = setting(True, "the batch stands beside a distorted view of itself")
    distortion: float = setting(0.3, "how far a view is from the sample, up to 1")
    seed: int = setting(0, "of the views")

    def __post_init__(self) -> None:
        if min(self.weight, self.temperature) <= 0 or not 0 < self.distortion < 1:
            raise RecipeError("supcon: weight and temperature above 0 and distortion between 0 and "
                              f"1 are expected, got {self.weight}, {self.temperature} and "
                              f"{self.distortion}")
        if not self.second_view and {"distortion", "seed"} & set(self.changed()):
            raise RecipeError("supcon: distortion and seed do nothing beside second_view=False")

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        head = head_linear(anatomy)
        return () if head is None else (f"{head.path}{INPUT}",)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        (path,) = self.taps(tuned.anatomy)
        labels = run.batch.get("labels") if isinstance(run.batch, Mapping) else None
        seen = [pooled(run.taps[path])]
        if not isinstance(labels, Tensor) or labels.is_floating_point() \
                or labels.shape != seen[0].shape[:1]:
            raise ConfigError("supcon brings samples of one class together: a batch has `labels`, "
                              "one class a sample")
        if self.second_view:
            draw = random.Random(f"supcon {self.seed} {tuned.timeline.step}").getrandbits(31)
            masked = accepts(tuned.model, "attention_mask")
            _, taps = run.once_more(lambda args, kw: view(args, kw, self.distortion, masked, draw))
            seen.append(pooled(taps[path]))
        yield self.weight * supervised(torch.cat(seen), labels.repeat(len(seen)), self.temperature,
                                       self.outside)
