from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from .distill import logits_of

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, in fp32 at least."""
    wide = torch.promote_types(student.dtype, torch.float32)
    return F.mse_loss(student.to(wide), teacher.to(wide))


@dataclass(frozen=True, kw_only=True)
class FeatureDistill(Method):
    """Feature distillation from the base: what each block hands on stays near what the base's did.

        loss + weight / L sum_blocks mean (f - t)^2 + logits mean (z - t_z)^2

    f the states after each of the L blocks in this forward, t those of the base (or of another
    `adapter`) on the same batch, without gradients and in eval mode; z, t_z the logits. Every
    position counts, as published for images. As in PELA, which makes good a compressed backbone
    with it: ``pela + feature_distill``, on data like the pre-training's.

    Trains nothing of its own; needs no second model: the base is the tuned model switched off.
    Costs one more forward per batch, and keeps the teacher's states until backward. Start: where
    step 0 is the base, the term and its gradient are zero. Refused in the first step beside a part
    that adds tokens of its own (prompts): they have no counterpart.
    """

    paper: ClassVar[str] = ("PELA: Learning Parameter-Efficient Models with Low-Rank Approximation "
                            "(2023), arXiv:2310.10700; FitNets (2015), arXiv:1412.6550")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    sees_run: ClassVar[bool] = True

    weight: float = setting(1.0, "kappa_f, of the features' term", alias=("kappa_f",))
    logits: float = setting(0.0, "kappa_l, of the logits' term", alias=("kappa_l",))
    adapter: str | None = setting(None, "the teacher: None is the base, else an adapter's name",
                                  unseen="a fresh model has no other adapter: "
                                         "tests/methods/test_feature_distill.py")

    def __post_init__(self) -> None:
        if min(self.weight, self.logits) < 0 or not (self.weight or self.logits):
            raise RecipeError("feature_distill: weight and logits of at least 0, one of them "
                              f"above, are expected; got {self.weight} and {self.logits}")

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        return tuple(b.path for b in anatomy.blocks) if self.weight else ()

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        paths = self.taps(tuned.anatomy)
        teacher = run.reference(self.adapter)
        if self.logits:
            yield self.logits * apart(logits_of(run.outputs, self.name),
                                      logits_of(teacher, self.name))
        if paths:
            theirs = run.reference_taps(self.adapter)
            pairs = [(state(run.taps[p]), state(theirs[p])) for p in paths]
            for path, (f, t) in zip(paths, pairs, strict=True):
                if f.shape != t.shape:
                    raise ConfigError("feature_distill compares states position by position, and "
                                      f"after {path} there are {tuple(f.shape)} beside "
                                      f"{tuple(t.shape)} of the teacher; leave out the part that "
                                      "adds tokens, or take weight=0, logits=1")
            yield self.weight / len(paths) * sum(apart(f, t) for f, t in pairs)


def state(out: Any) -> Tensor:
    """The states among what a block returns."""
    state: Tensor = out[0] if isinstance(out, tuple | list) else out
    return state
