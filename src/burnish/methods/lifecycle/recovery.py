from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...blocks.state.taps import evaluating
from ...blocks.weight.restored import Restored, Restoring, Score
from ...core.errors import ConfigError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Recovery(Method):
    """Recovering alignment: a few weights of a tuned model are put back to the aligned one's.

    h(x; theta) is the state of the last token after block E, theta_a the aligned weights, theta_f
    the tuned ones. d_h is the mean of h over harmful prompts under theta_a, d_b that over prompts
    of the task under theta_f. A step:

        g <- g + sum over batches of d/dtheta ( - cos(mean of h over the batch, d_h) )

    and of the entries where theta - theta_a and g have one strict sign (descent goes to theta_a)
    the `restored` share of all parameters with the largest |g| become theta_a; one threshold over
    the weights of blocks 1 to E, norms left out, of equal |g| at the threshold none.

    After `warmup` steps the task is scored. Where it has lost more than `drop`, all begins anew
    with a rollback in every step: g starts from nothing, and of the entries just restored where
    theta - theta_f and the gradient of ``- cos(mean h of the task, d_b)`` have one sign, the share
    `back` with the largest gradient become theta_f again. Every `every` steps the model is scored,
    and the safest within `drop` is what stands in the end; the tuned model itself is among them::

        told = burnish.parse("recovery")[0].lifecycle(
            model, aligned, harmful, task, score=quality, harm=harmful_rate)

    model: tuned, an update merged first. aligned: its tensors before tuning, by parameter name.
    harmful, task: batches of prompts (256 of each, 8 at once, as published). score: the task's
    figure, higher is better. harm: lower is better (``burnish audit`` has such a rate).

    Every weight is bit for bit theta_a's or theta_f's, no more than `steps` x `restored` of them
    theta_a's. Takes forward and backward through E blocks and, of these, theta_f, theta_a and g.
    layers=None is half of the blocks; a third to two thirds by model, as published. The share of
    a rollback is of the entries that may go back (unconfirmed).

    Published: harmful rate of 125 models from 33.25 % to 1.74 %.
    """

    paper: ClassVar[str] = ("Alleviating the Fear of Losing Alignment in LLM Fine-tuning, IEEE "
                            "S&P 2025, arXiv:2504.09757")
    tier: ClassVar[str] = "checked against an independent equation"

    restored: float = setting(0.002, "share of all parameters that a step puts back")
    steps: int = setting(20, "of recovery")
    warmup: int = setting(5, "steps before the task is scored")
    every: int = setting(5, "steps between two models to choose from")
    layers: int | None = setting(None, "blocks from the first; None: half of them")
    drop: float = setting(0.05, "share of the task's figure that may be lost")
    back: float = setting(0.2, "share that a rollback gives back")

    def __post_init__(self) -> None:
        if not (0 < self.restored <= 1 and 0 <= self.drop and 0 < self.back <= 1):
            raise ConfigError("recovery: restored and back are shares above 0 and up to 1, drop is "
                              f"at least 0, got {self.restored:g}, {self.back:g} and {self.drop:g}")
        if not 1 <= self.warmup <= self.steps or not 1 <= self.every <= self.steps:
            raise ConfigError(f"recovery: warmup={self.warmup} and every={self.every} are steps of "
                              f"{self.steps}")
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"recovery: layers={self.layers}: expected at least 1")
        if self.targets is not None:
            raise ConfigError("recovery: the weights of the first `layers` blocks are put back; "
                              "targets do nothing")

    def lifecycle(self, model: nn.Module, aligned: Mapping[str, Tensor],
                  harmful: Iterable[Mapping[str, Any]], task: Iterable[Mapping[str, Any]], *,
                  score: Score, harm: Score) -> Restored:
        """Puts weights back in place, and says which."""
        if not isinstance(model, nn.Module):
            raise ConfigError("recovery puts weights of a plain model back: merge the update first "
                              "(tuned.merge())")
        run = Restoring(model, aligned, list(harmful), list(task), share=self.restored,
                        layers=self.layers, back=self.back)
        try:
            with evaluating([m for m in model.modules() if m.training]):
                found = run.choose(
                    score, harm, steps=self.steps, warmup=self.warmup, every=self.every,
                    drop=self.drop)
        except BaseException:
            run.tuned_again()
            raise
        run.stand(found.index)
        return found
