from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from ...core.outputs import LOGITS, next_token

if TYPE_CHECKING:
    from ...engine.tuned import Tuned


def divergence(student: Tensor, teacher: Tensor, temperature: float,
               counts: Tensor | None = None) -> Tensor:
    """``T^2 mean_n KL(softmax(t_n / T) || softmax(z_n / T))`` over rows n of (..., classes).

    In fp32 whatever the logits are held in. counts: mask (...,) of the rows that count.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    z = F.log_softmax(student.to(wide) / temperature, -1)
    t = F.log_softmax(teacher.to(wide) / temperature, -1)
    rows = (t.exp() * (t - z)).sum(-1)
    if counts is None:
        return temperature**2 * rows.mean()
    m = counts.to(rows.dtype)
    return temperature**2 * (rows * m).sum() / m.sum().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """Distillation from the base: what trains stays close to what the base would have said.

        loss + weight T^2 mean KL(softmax(t / T) || softmax(z / T))

    z the logits of this forward, t those of the base (or of another `adapter`) on the same batch,
    without gradients and in eval mode. With labels per token, rows that answer no label do not
    count (row n of a model that writes on answers label n + 1; see core/outputs.py). Where pictures
    are compared with texts z are the logits per picture. Models whose forward declares outputs
    without logits are refused when the recipe is joined.
    T^2 keeps the size of the gradient as T changes.

    Trains nothing of its own; needs no second model: the base is the tuned model switched off, its
    trained base tensors standing aside. Costs one more forward per batch, and keeps the teacher's
    logits until backward. Start: with an update of zero the term and its gradient are zero.
    """

    paper: ClassVar[str] = ("Distilling the Knowledge in a Neural Network (2015), "
                            "arXiv:1503.02531; Learning without Forgetting, ECCV 2016")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    sees_run: ClassVar[bool] = True

    weight: float = setting(1.0, "of the term")
    temperature: float = setting(2.0, "T, softens both distributions", alias=("T",))
    adapter: str | None = setting(None, "the teacher: None is the base, else an adapter's name",
                                  unseen="a fresh model has no other adapter: "
                                         "tests/methods/test_distill.py")

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise RecipeError(f"distill(temperature={self.temperature}): expected a positive one")

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        yield self.weight * from_reference(tuned, run, self.temperature, self.adapter)


def from_reference(tuned: Tuned, run: Any, temperature: float, adapter: str | None = None
                   ) -> Tensor:
    """:func:`divergence` of a forward from the base's (or another adapter's), over the rows that
    answer a label."""
    student, teacher = logits_of(run.outputs), logits_of(run.reference(adapter))
    return divergence(student, teacher, temperature,
                      counted(tuned.model, run.batch, student.shape[:-1]))


def counted(model: nn.Module, batch: Any, rows: torch.Size) -> Tensor | None:
    """Which rows of logits answer a label; None where labels are not per row. A model
    that writes on is given its own input as labels: row n answers for the token n + 1."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.shape != rows or labels.is_floating_point():
        return None
    if next_token(model):
        labels = F.pad(labels[..., 1:], (0, 1), value=-100)
    return labels != -100


def logits_of(out: Any, part: str = "distill") -> Tensor:
    """What a model answers, among its outputs."""
    found = out if isinstance(out, Tensor) else next(
        (t for name in LOGITS if (t := out.get(name) if isinstance(out, Mapping)
                                  else getattr(out, name, None)) is not None), None)
    if found is None and isinstance(out, tuple):
        found = next((t for t in out if isinstance(t, Tensor) and t.dim() > 1), None)
    if not isinstance(found, Tensor) or not found.dim():
        raise ConfigError(f"{part} compares logits, and this model returns none (a tensor, or "
                          "outputs with .logits or .logits_per_image)")
    return found
