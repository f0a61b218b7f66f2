from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.state.consistency import Styled, Swapped, Turn, apart, learnt
from ...blocks.state.taps import evaluating
from ...blocks.update.adapting import Adapting, asking
from ...core.batches import call
from ...core.errors import ConfigError, DataError
from ...core.method import Method, setting
from ._adapted import (
    Adapts,
    class_logits,
    in_classes,
    labels_of,
    linear_head,
    module_of,
    stages_of,
    untargeted,
)


@dataclass(frozen=True, kw_only=True)
class Itta(Adapts, Method):
    """ITTA: a consistency loss that learns to pull where the labels do, then moves maps of its own.

    z, z' (B, D) are features of samples and of copies in a mixed style (mean and deviation of each
    channel, Beta(alpha, alpha); behind the first stage or, half of the time, the second), and

        L = mean f_w(z' - z)^2,        f_w: 10 layers  v <- relu(w v + b),  the last without relu

    On every labelled batch of `source`, batch norms in evaluation mode, two steps of Adam:

        model:  CE(z) + CE(z') + L
        f_w:    0.1 mean (g_L - g_CE)^2,        g: backbone gradients, less mean, over deviation

    the second through the first derivative (second order). Then, for every batch of a stream, maps
    of five such layers (C, H, W) behind each stage make one step of Adam on ``c L``, and answer.
    f_w and maps move at a tenth of `step_rate`::

        with burnish.parse("itta")[0].lifecycle(model, source) as adapted:
            for batch in stream:
                outputs = adapted(batch)

    Start: w = 1, b = 0. Behind stages whose outputs are not negative, and others are refused, the
    maps are the identity: until a step the answer is the trained model's. Of a stream nothing but
    maps moves: 3,763,200 numbers for ResNet-18 at 224; f_w has 20 D, 10,240 there. channels=True:
    a number a channel, for samples of any size (not the paper's). Leaving gives back the model as
    it was before `source`; both are held.

    As in the released code gradients are standardised all together; there mean and deviation are
    constants, here the derivative is whole. Adam sees c through its eps alone.

    When: other styles of the same classes. When not: a sample at a time, which has no other to
    mix with.
    """

    paper: ClassVar[str] = ("Improved Test-Time Adaptation for Domain Generalization, CVPR 2023, "
                            "arXiv:2304.04494")
    tier: ClassVar[str] = "checked against an independent equation"
    learns: ClassVar[bool] = True

    step_rate: float = setting(5e-5, "learning rate of these updates")
    weight: float = setting(1e-6, "c, of the loss at test")
    mix: float = setting(0.1, "both parameters of the Beta that styles are mixed by")
    channels: bool = setting(False, "maps of a number a channel, not a place")
    seed: int = setting(0, "of styles")

    def __post_init__(self) -> None:
        untargeted(self, "maps of its own move")
        if not (self.step_rate > 0 and self.weight > 0 and self.mix > 0):
            raise ConfigError("itta: positive step_rate, weight and mix are expected, got "
                              f"{self.step_rate:g}, {self.weight:g} and {self.mix:g}")

    def lifecycle(self, tuned: Any, source: Iterable[Any]) -> Adapting:
        """The model, or what ``tune`` returned, as it answers a stream, once it has learnt of
        labelled batches."""
        model, head = module_of(tuned), linear_head("itta", tuned)
        styled = Styled("itta", stages_of("itta", tuned), head, self.mix)
        theta = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        with torch.inference_mode(False), torch.enable_grad(), asking(model, theta.values()), \
                evaluating([m for m in model.modules() if m.training]):
            was = {n: p.detach().clone() for n, p in theta.items()}
            styled.rng, taps = random.Random(f"{self.seed} source"), styled.hooks()
            try:
                f_w = learnt(styled, theta, self._turns(model, source), self.step_rate)
                values = {n: p.detach().clone() for n, p in theta.items()}
            finally:
                for tap in taps:
                    tap.remove()
                for n, p in theta.items():
                    p.data.copy_(was[n])
            if f_w is None:
                raise DataError("itta learns of labelled source data: there is no batch of them")
            maps = styled.start(self.channels)

        def hooks() -> list[Any]:
            styled.rng = random.Random(f"{self.seed} test {adapted.steps}")
            return styled.hooks()

        adapted = Adapting("itta", model, maps, lambda out: self.weight * apart(styled, f_w),
                           lr=0.1 * self.step_rate, after=True, hooks=hooks)
        return adapted.beside(Swapped(theta, values, {"w": f_w[0], "b": f_w[1]}))

    def _turns(self, model: nn.Module, source: Iterable[Any]) -> Iterator[Turn]:
        for batch in source:
            y, given = labels_of("itta", batch)

            def run(given: Any = given, y: Tensor = y) -> Tensor:
                logits = class_logits(call(model, given), "itta")
                in_classes("itta", y, logits.shape[1])
                return logits

            yield run, y
