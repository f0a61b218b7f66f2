from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from ...core.outputs import next_token
from .distill import logits_of

if TYPE_CHECKING:
    from ...engine.tuned import Tuned


def softened(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """``mean_n (CE(softmax(t_n), z_n) - CE(y_n, z_n))`` over the rows n of (..., classes) whose
    label is not -100: what a target between the label and softmax(t) adds, per part of the
    latter."""
    wide = torch.promote_types(z.dtype, torch.float32)
    logq, p = F.log_softmax(z.to(wide), -1), t.to(wide).softmax(-1)
    counts = labels != -100
    right = logq.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    rows = right - (p * logq).sum(-1)
    m = counts.to(rows.dtype)
    return (rows * m).sum() / m.sum().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class PsKd(Method):
    """PS-KD: the target is the label mixed with what this model said of the sample an epoch ago.

        CE((1 - a_t) y + a_t p_{t-1}(x), p_t(x)),     a_t = alpha t / T        t = 1 .. T

    p_t the model in the t-th of T = `stretches` parts of the run, p_{t-1} as it stood when the one
    before ended; in the first there is none, and a_1 is 0. It is a term beside the model's loss,
    ``a_t mean (CE(p_{t-1}, z) - CE(y, z))`` over the rows that answer a label, so that what else
    the loss holds (a smoothing) stays; the loss that is told is the model's own.

    For classifiers and language models whose labels are hard and few or partly wrong: targets
    soften as the model learns. `stretches` is the epochs of the run. The length of the run
    (``tuned.total_steps``; fit says it) has to be known.

    Trains nothing of its own; holds a copy of what trains, in the file of a checkpoint too. From
    the second stretch on a forward more per batch, without gradients and in evaluation mode. Start:
    the plain loss. A base that trains whole (`full`) has its copy as large as itself.

    Departure: the authors keep what each sample was given while it trained; here the model of the
    end of the epoch is asked, as they do for ImageNet (unconfirmed): one teacher for all samples.
    """

    paper: ClassVar[str] = ("Self-Knowledge Distillation with Progressive Refinement of Targets, "
                            "ICCV 2021, arXiv:2006.12000")
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "own loss"})
    sees_run: ClassVar[bool] = True
    small: ClassVar[Mapping[str, Any]] = {"stretches": 2}

    alpha: float = setting(0.8, "alpha_T, share of the model's own word at the end", other=(0.3,))
    stretches: int = setting(10, "T, stretches of the run", other=(3,))

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.stretches < 2:
            raise RecipeError("ps_kd: alpha above 0 and up to 1, and stretches of at least 2 (the "
                              "first has no teacher) are expected, got "
                              f"{self.alpha:g} and {self.stretches}")

    def controller(self, tuned: Tuned) -> Earlier:
        return Earlier(self, tuned)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        handler = next(h for _, h in tuned.timeline.handlers if isinstance(h, Earlier))
        z, share = logits_of(run.outputs, self.name), handler.share(tuned.timeline.step)
        if not handler.values:
            yield 0 * z.sum()
            return
        labels = run.batch.get("labels") if isinstance(run.batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.is_floating_point() \
                or labels.shape != z.shape[:-1]:
            raise ConfigError("ps_kd mixes labels that are classes with what the model said: "
                              "expected a batch with `labels`, one class for each row of logits "
                              f"{tuple(z.shape)}")
        if next_token(tuned.model):
            labels = F.pad(labels[..., 1:], (0, 1), value=-100)
        yield share * softened(z, logits_of(run.earlier(handler.values), self.name), labels)


class Earlier:
    """Holds what trains, as it stood when the last stretch ended."""

    def __init__(self, method: PsKd, tuned: Tuned):
        self.method, self.tuned = method, tuned
        self.values: dict[str, Tensor] = {}
        self.full = False                            # in rehearsal: as if a stretch had ended

    @property
    def length(self) -> int:
        """Updates of a stretch."""
        total = self.tuned.total_steps
        if total is None:
            raise ConfigError("ps_kd: how much the model's own word counts grows over the run, and "
                              "its length is not known: tuned.total_steps = ...")
        return max(1, -(-total // self.method.stretches))

    def share(self, step: int) -> float:
        """a_t of an update."""
        if self.full:
            return self.method.alpha
        t = 1 + step // self.length
        return 0.0 if t == 1 else self.method.alpha * min(t, self.method.stretches) \
            / self.method.stretches

    def rehearse(self, step: int) -> None:
        self.full = True
        self.keep()

    def after_update(self, step: int) -> None:
        if not self.full and (step + 1) % self.length == 0:
            self.keep()

    def keep(self) -> None:
        with torch.no_grad():
            self.values = {n: p.detach().clone() for n, p in self.tuned.named_parameters()}

    def state_dict(self) -> Mapping[str, Any]:
        return {"values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        now = dict(self.tuned.named_parameters())
        self.values = {n: v.to(now[n]) for n, v in state["values"].items()}
