from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.state.calibrated import Pairs, rotation, shifted
from ...core.errors import ConfigError, RecipeError
from ...core.method import INPUT, Method, setting
from ...core.needs import head_linear
from .distill import logits_of

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class DrTune(Method):
    """DR-Tune: the head must also classify the pre-trained model's features, moved to the new ones.

        CE(h(f(x)), y) + weight mean_i CE(h(s out_i), y_i)      i over the last `buffer` samples

    f(x) what the head h reads, z = f(x) / ||f(x)|| and z0 that of the base, s the batch's mean
    ||f(x)||. out_i is z0_i after a rotation R that brings the base's features onto the trained ones
    (Kabsch, anew every `every` updates and kept in between), a shift of each class to where the
    head is surest of it, and taken to length one (blocks/state/calibrated.py). Nothing of the
    second term reaches f: the head is held back from the new features alone, f is not.

    Beside what trains the encoder, with the head: ``full + dr_tune``. The buffer fills as the run
    goes (where the model begins as the base both features are the same). Start: R = 1. A forward of
    the base more, and an SVD of (D, D); kept: 2 `buffer` D numbers. A probe changes nothing of it.

    Departures from the released code, as it is not what it says: two means in place of one over
    batch and buffer, which makes the term 97 %; R is used between its updates; means are moved
    back. (weight = 1 is a best reading.)
    """

    paper: ClassVar[str] = ("DR-Tune: Improving Fine-tuning of Pretrained Visual Models by "
                            "Distribution Regularization with Semantic Calibration, ICCV 2023, "
                            "arXiv:2308.12058")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"linear head", "logits"})
    relies_on: ClassVar[tuple[str, ...]] = ("gradients",)
    sees_run: ClassVar[bool] = True
    small: ClassVar[Mapping[str, Any]] = {"buffer": 4, "every": 1}

    weight: float = setting(1.0, "lambda, of the second term")
    buffer: int = setting(2048, "K, samples whose features are held")
    every: int = setting(10, "updates between two rotations", other=(2,))

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf") or min(self.buffer, self.every) < 1:
            raise RecipeError("dr_tune: a positive weight, and a buffer and every of at least 1 "
                              f"are expected, got {self.weight}, {self.buffer} and {self.every}")

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        head = head_linear(anatomy)
        return () if head is None else (f"{head.path}{INPUT}",)

    def controller(self, tuned: Tuned) -> Calibrating:
        return Calibrating(self, tuned)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        labels = run.batch.get("labels") if isinstance(run.batch, Mapping) else None
        logits = logits_of(run.outputs, self.name)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or logits.dim() != 2 \
                or labels.shape != logits.shape[:1]:
            raise ConfigError("dr_tune holds features by class: a batch has `labels`, one class a "
                              "sample")
        (path,) = self.taps(tuned.anatomy)
        new, old = (_features(taps[path]) for taps in (run.taps, run.reference_taps()))
        handler = next(h for _, h in tuned.timeline.handlers if isinstance(h, Calibrating))
        out, right = handler.calibrated(new.detach(), old.detach(), labels, logits.shape[1],
                                        tuned.steps.still)
        head = tuned.model.get_submodule(path.removesuffix(INPUT))
        said = head(out.to(new.dtype))
        yield self.weight * F.cross_entropy(
            said.to(torch.promote_types(said.dtype, torch.float32)), right)


class Calibrating:
    """Holds the features, and the last rotation."""

    def __init__(self, method: DrTune, tuned: Tuned):
        self.method, self.tuned = method, tuned
        self.pairs = Pairs(method.buffer)
        self.R: Tensor | None = None
        self.at: int | None = None
        self.fill = False

    def rehearse(self, step: int) -> None:
        self.fill = True                             # as it will be, all that is held

    @torch.no_grad()
    def calibrated(self, new: Tensor, old: Tensor, labels: Tensor, classes: int, still: bool
                   ) -> tuple[Tensor, Tensor]:
        """(K, D) features for the head and (K,) their classes; these samples are held, unless the
        pass is one that leaves no trace."""
        step, pairs = self.tuned.timeline.step, self.pairs.copy() if still else self.pairs
        wide = torch.promote_types(new.dtype, torch.float32)
        new, old = new.to(wide), old.to(wide)
        size = new.norm(dim=1).mean()
        pairs.add(F.normalize(new), F.normalize(old), labels)
        if self.fill:
            pairs.put, self.fill = max(pairs.put, pairs.room), False
        z, z0, right = pairs.read()
        R = self.R
        if R is None or self.at is None or step - self.at >= self.method.every:
            R = rotation(z0 - z0.mean(0), z)         # with one of them centred both are
            if not still:
                self.R, self.at = R, step
        y = z0 @ R.t()                               # the shift of its class moves it anyway
        member = (right.unsqueeze(1) == torch.arange(classes, device=right.device)).to(wide)
        (path,) = self.method.taps(self.tuned.anatomy)
        rows: Any = self.tuned.model.get_submodule(path.removesuffix(INPUT)).weight
        t = shifted(y, z, member, rows.detach().to(wide))
        return F.normalize(y + t) * size, right.clone()

    def state_dict(self) -> Mapping[str, Any]:
        return {"pairs": dict(vars(self.pairs)), "R": self.R, "at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pairs.load({k: v.clone() if isinstance(v, Tensor) else v
                         for k, v in state["pairs"].items()})
        self.R, self.at = state["R"], state["at"]


def _features(h: Tensor) -> Tensor:
    if h.dim() != 2:
        raise ConfigError("dr_tune reads one row of features a sample before the head, and here "
                          f"are {list(h.shape)}")
    return h
