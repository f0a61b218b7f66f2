from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks.weight.fusing import Fused, Fusing
from ...core.errors import ConfigError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Somf(Method):
    """SOMF: of what tuning changed, a learned mask leaves out what safety suffers from.

        tau_t = theta_t - theta_a            theta(m) = theta_a + sum_t lambda_t m * tau_t
        m = sigmoid((log u - log(1 - u) + s) / T),     u uniform, drawn anew for every step

    theta_a the aligned weights, theta_t those after each task, one logit s per entry shared by the
    tasks. Adam on s goes down

        loss(theta(m)) + weight * mean(1 - m)

    with T falling from `hot` to `cold` in a line over the steps; then m = 1[s > 0] for good: what
    is masked is theta_a again bit for bit, what is kept of a single task (lambda 1) theta_t's::

        told = burnish.parse("somf")[0].lifecycle(model, aligned, [tuned], batches)

    model: one of their architecture, which stands fused afterwards. batches: safety data, harmful
    prompts with answers that refuse; a few hundred. loss: of (outputs, batch), default the model's
    own. No data of the tasks are needed.

    Start: s = `start`, so m is nearly 1 and the model the tuned ones' sum. form="entry" has a logit
    per entry (4 bytes and two moments of that), "row" one per row of a matrix, 1 / in of it. Takes
    a forward and backward of the whole model; gradient of m: ``tau * dL / dtheta``.

    All but the relaxed mask is a reading of the abstract (unconfirmed): the sparsity of what is
    removed as a mean, its weight, Adam and its rate.
    """

    paper: ClassVar[str] = ("A safety realignment framework via subspace-oriented model fusion for "
                            "large language models (2024), arXiv:2405.09055")
    tier: ClassVar[str] = "from the text"

    form: Literal["entry", "row"] = setting("entry", "what a logit masks")
    weight: float = setting(0.1, "of the share that is left out")
    updates: int = setting(200, "steps on the logits")
    step_rate: float = setting(0.1, "learning rate of these updates")
    start: float = setting(3.0, "logit of every mask before the first step")
    hot: float = setting(1.0, "T at the first step")
    cold: float = setting(0.1, "T at the last step")
    seed: int = setting(0, "of u")

    def __post_init__(self) -> None:
        if self.form not in ("entry", "row"):
            raise ConfigError(f"somf: form={self.form!r}: expected entry or row")
        if self.updates < 1 or not self.step_rate > 0 or self.weight < 0 or not self.start > 0:
            raise ConfigError("somf: updates of at least 1, a positive step_rate and start and a "
                              f"weight of at least 0 are expected, got {self.updates}, "
                              f"{self.step_rate:g}, {self.start:g} and {self.weight:g}")
        if not 0 < self.cold <= self.hot:
            raise ConfigError("somf: temperatures fall and stay above 0, got "
                              f"hot={self.hot:g} and cold={self.cold:g}")
        if self.updates == 1 and "cold" in self.changed():
            raise ConfigError("somf: one update is made at hot; cold is of the last of several")
        if self.targets is not None:
            raise ConfigError("somf: what the tasks have changed is masked; targets do nothing")

    def lifecycle(self, model: nn.Module, aligned: Mapping[str, Tensor],
                  tuned: Sequence[Mapping[str, Tensor]], batches: Iterable[Mapping[str, Any]], *,
                  scales: Sequence[float] | None = None,
                  loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None) -> Fused:
        """Learns the mask, leaves the model fused by it, and says what it is. scales: lambda_t,
        default 1 each."""
        data = list(batches)
        if not data:
            raise ConfigError("somf needs batches of safety data")
        run = Fusing(model, aligned, tuned, scales, self.form == "row", self.start)
        g = torch.Generator().manual_seed(self.seed)
        try:
            for t in range(self.updates):
                share = t / max(1, self.updates - 1)
                heat = self.hot + (self.cold - self.hot) * share
                run.step(data[t % len(data)], loss, heat, self.weight, self.step_rate, g)
            return run.fused()
        except BaseException:
            run.stand_as_before()
            raise
