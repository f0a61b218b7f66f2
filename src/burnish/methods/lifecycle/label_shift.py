from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.state.prior_head import PriorHead
from ...blocks.update.adapting import Adapting
from ...core.draw import drawn
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.recipe import parse
from ._adapted import Adapts, labelled, linear_head, module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class LabelShift(Adapts, Method):
    """Label shift adapter: the head follows how often each class comes in the stream.

    An MLP g (K -> hidden -> K D + K + 2 D) makes of the shares pi (K,) of the classes a change of
    the head's weight and bias, and a scale and shift of the features h (B, D) it reads:

        (dW, db, gamma, beta) = g(pi),        h' = (1 + gamma) h + beta
        z = (W + dW) h' + b + db + tau log pi

    It learns on labelled source data while all else is frozen: per update pi is drawn long-tailed,
    uniform or inverse, `per_update` rows are taken by it, and g goes down the cross-entropy of z.
    Then, from pi uniform, for every batch of a stream

        pi <- decay pi + (1 - decay) mean_i softmax(z_i),         and z under that pi is answered::

        adapted = burnish.parse("label_shift")[0].lifecycle(model, source)
        with adapted:                    # model, or what tune() returned; source: labelled batches
            for batch in stream:
                outputs = adapted(batch)

    under: another method that adapts, whose features these are, ``label_shift(under='tent')``; its
    loss reads z. prior: the
    shares, (K,), where they are known; nothing is estimated then.

    Start: W2 = b2 = 0, and with pi uniform every answer is the source's. Trains
    ``K hidden + hidden + (hidden + 1) (K D + K + 2 D)`` numbers, 207,462,796 for 1,000 classes of
    2,048 features. The source is read once, with no gradient: its features, N D numbers, are kept
    while g learns.

    Best readings, all unconfirmed: the sizes; that the softmax is of what answers, which makes
    the estimate a fixed point of expectation-maximisation; the long tail's classes in the order
    of their source counts (`order="drawn"`: another order each update, for shifts of any kind);
    `tail`; and that the answer keeps tau log pi. As rows come by pi, the loss makes z, the
    term included, the posterior under pi: without it (tau = 1) answers would forget pi again. At
    ``adjust=0`` g alone has to learn that.

    When: classes come in other shares than in training. When not: their shares are as they were,
    or the model is wrong about what it sees, and pi with it.
    """

    paper: ClassVar[str] = ("Label Shift Adapter for Test-Time Adaptation under Covariate and "
                            "Label Shifts, ICCV 2023, arXiv:2308.08810")
    tier: ClassVar[str] = "from the text"
    learns: ClassVar[bool] = True

    hidden: int = setting(100, "width of g between its layers")
    decay: float = setting(0.9, "of the estimated shares, from batch to batch; 1 - m")
    adjust: float = setting(1.0, "tau, how much log pi counts")
    steps: int = setting(1000, "updates of g on source data")
    per_update: int = setting(64, "source rows of an update")
    step_rate: float = setting(1e-3, "learning rate of these updates")
    tail: float = setting(100.0, "largest share over the smallest, of a long tail")
    order: Literal["source", "drawn"] = setting("source", "which classes of a long tail come first")
    under: str | None = setting(None, "another method that adapts meanwhile: tent, ...")
    seed: int = setting(0, "of g's start and of what is drawn")

    def __post_init__(self) -> None:
        untargeted(self, "it is the head that follows")
        if min(self.hidden, self.steps, self.per_update) < 1 or not self.step_rate > 0:
            raise ConfigError("label_shift: hidden, steps and per_update of at least 1 and a "
                              f"positive step_rate are expected, got {self.hidden}, {self.steps}, "
                              f"{self.per_update} and {self.step_rate:g}")
        if not 0 <= self.decay < 1 or not self.adjust >= 0 or not self.tail > 1:
            raise ConfigError("label_shift: a decay from 0 up to 1, an adjust of at least 0 and a "
                              f"tail above 1 are expected, got {self.decay:g}, {self.adjust:g} "
                              f"and {self.tail:g}")
        if self.order not in ("source", "drawn"):
            raise ConfigError(f"label_shift: order={self.order!r}: expected source or drawn")
        if self.under is not None:
            parts = parse(self.under)
            if len(parts) != 1 or not isinstance(parts[0], Adapts) or parts[0].learns:
                raise ConfigError(f"label_shift: under={self.under!r}: expected one method that "
                                  "adapts and reads no source data, tent or alpha_bn")

    def lifecycle(self, tuned: Any, source: Iterable[Any], *, prior: Tensor | None = None
                  ) -> Adapting:
        """The model, or what ``tune`` returned, as it answers a stream; g has learnt by then.

        source: batches with ``labels``, or pairs. prior: (K,) shares, where they are known.
        """
        with torch.inference_mode(False):
            return self._learnt(tuned, source, prior)

    def _learnt(self, tuned: Any, source: Iterable[Any], prior: Tensor | None) -> Adapting:
        head = linear_head("label_shift", tuned)
        h, labels, classes = labelled("label_shift", module_of(tuned), head, source)
        if prior is not None and (prior.shape != (classes,) or bool((prior < 0).any())
                                  or abs(float(prior.sum()) - 1) > 1e-4):
            raise ConfigError(f"label_shift: prior is {classes} shares that add up to 1")
        adapted = Adapting("label_shift", module_of(tuned)) if self.under is None else \
            parse(self.under)[0].lifecycle(tuned)
        with drawn(self.seed):
            part = PriorHead("label_shift", head, h, classes, self.hidden, self.adjust, self.decay,
                             prior)
            part.learn(h, labels, updates=self.steps, rows=self.per_update, rate=self.step_rate,
                       imbalance=self.tail, drawn_order=self.order == "drawn")
        return adapted.beside(part)
