from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.update.edited import Editor
from ...blocks.update.objective import loss_of
from ...core.anatomy import Anatomy
from ...core.errors import ConfigError, DataError
from ...core.method import Method, setting
from ...core.targets import match
from ..objective.distill import counted, logits_of


@dataclass(frozen=True, kw_only=True)
class Mend(Method):
    """MEND: a net learns to turn the gradient of one wrong answer into an edit that stays local.

        dL/dW = sum_t d_t u_t^T                 z = [(u - mu) / (s + 1e-7); the same of d]
        z <- z + relu(gamma * (U V z + b) + beta)        twice, U (in + out, bottleneck)
        W' = W - alpha sum_t d~_t u~_t^T        (u~, d~) = z

    u (in,) is what a row of the edit reads at W (out, in), d (out,) the gradient there; mu and s
    run over the rows of all lessons at all matrices of one shape (Welford; rows of zeros have no
    part; that a shape has them in common is a best reading). One net for matrices of one shape,
    with gamma, beta and alpha of each. Lessons are (edit, rephrased, local), three batches; Adam
    goes down, by the mean of `lessons` at a time,

        weight * loss(rephrased; W') + mean KL(p(local; W) || p(local; W'))

    through the net, u and d as constants; the base is frozen::

        editor = burnish.parse("mend")[0].lifecycle(model, lessons)
        edit = editor(batch)                    # with the labels it should answer
        with edit.standing(): model(...)        # or edit.merge(), for good

    Start: U = 0, V normal, b = beta = 0, gamma = 1: the step goes along minus the whitened outer
    products. Trains, for each shape, ``2 (2 bottleneck (in + out) + in + out)`` and ``4 (in +
    out) + 1`` for each matrix. Kept: factors, never a matrix (out, in). Merges exactly; the rank of
    a change is at most the rows of its edit.

    `targets`: linears, by default the MLPs of the last three blocks. loss: of (outputs, batch),
    default the model's own, else cross-entropy of (inputs, classes). As many steps as lessons last:
    the paper stops when 20,000 steps have not helped. The released code adds alpha times d~ u~^T,
    whose sign alpha has to learn; here it is minus. When not: inputs that no lesson had (a unit
    that was always 0 has s = 0); many edits one after the other.
    """

    paper: ClassVar[str] = "Fast Model Editing at Scale, ICLR 2022, arXiv:2110.11309"
    tier: ClassVar[str] = "checked against an independent equation"
    edits: ClassVar[bool] = True

    bottleneck: int = setting(1920, "width of the net's bottleneck")
    scale: float = setting(1e-4, "alpha before the first step", above=0.0)
    weight: float = setting(0.1, "of the loss on what was rephrased")
    lessons: int = setting(10, "of one step, their mean")
    step_rate: float = setting(1e-6, "learning rate of these updates")
    scale_rate: float = setting(1e-4, "learning rate of every alpha")
    grad_norm: float = setting(100.0, "largest norm of a step's gradient")
    seed: int = setting(0, "of V")

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or self.lessons < 1 or self.weight < 0:
            raise ConfigError("mend: a bottleneck and lessons of at least 1 and a weight of at "
                              f"least 0 are expected, got {self.bottleneck}, {self.lessons} and "
                              f"{self.weight:g}")
        if not (self.step_rate > 0 and self.scale_rate > 0 and self.grad_norm > 0):
            raise ConfigError("mend: positive rates and grad_norm are expected, got "
                              f"{self.step_rate:g}, {self.scale_rate:g} and {self.grad_norm:g}")

    def lifecycle(self, model: nn.Module, lessons: Iterable[Any],
                  loss: Callable[[Any, Any], Tensor] | None = None) -> Editor:
        """Learns of lessons until they end; the editor. The model stays as it is."""
        editor = self.editor(model, loss)
        if editor.learn(lessons, self.lessons, self.weight, (self.step_rate, self.scale_rate),
                        self.grad_norm):
            return editor
        raise DataError("mend learns of lessons, and there are none")

    def editor(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None = None) -> Editor:
        """One that has learnt nothing, for tensors of a file to be loaded into."""
        if not isinstance(model, nn.Module):
            raise ConfigError("mend edits a plain model; merge what was tuned first")
        anatomy = Anatomy.of(model)
        places = match(anatomy, "mlp@-3:" if self.targets is None else self.targets)
        for p in places:
            if p.kind not in ("linear", "conv1d") or p.rows or anatomy.tied(p):
                raise ConfigError(f"mend edits whole linears that no other module shares, and "
                                  f"{p.name} is none ({p.kind}): name others by targets")
            if not p.stored(model.get_submodule(p.path)).is_floating_point():
                raise ConfigError(f"mend: {p.name} is held as codes, which no edit can be added to")
        return Editor(model, places, self.bottleneck, self.scale, self.seed, loss or _loss,
                      lambda out: logits_of(out, "mend"), lambda b, rows: _counts(model, b, rows))


def _loss(out: Any, batch: Any) -> Tensor:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return F.cross_entropy(logits_of(out, "mend"), batch[1])
    if (found := loss_of(out)) is None:
        raise ConfigError("mend: the model gives no loss for these batches: bring labels, or "
                          "(inputs, classes), or say loss=")
    return found


def _counts(model: nn.Module, batch: Any, rows: torch.Size) -> Tensor | None:
    """Rows of logits that answer a label, else those that are no padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    found = counted(model, batch, rows)
    apart = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return found if found is not None or mask is None or apart or mask.shape != rows else mask
