from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.batch_statistics import remembering
from ...blocks.update.adapting import Adapting
from ...blocks.update.rules import AdamW
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import Adapts, affines, class_logits, module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class AlphaBn(Adapts, Method):
    """Alpha-BN: batch norms take a mix of the source's statistics and the test batch's. And Core.

        mu = alpha mu_s + (1 - alpha) mu_t           s2 = alpha s2_s + (1 - alpha) s2_t
        BN(x) = gamma (x - mu) / sqrt(s2 + eps) + beta

    mu_s, s2_s are what training left, mu_t, s2_t of the batch (biased variance). alpha=1 is the
    source model, alpha=0 test-time batch norm, TENT's baseline without a step::

        with burnish.parse("alpha_bn")[0].lifecycle(model) as adapted:   # or what tune() returned
            for batch in stream:
                outputs = adapted(batch)

    Core is ``alpha_bn(updates=1)``: a step per batch over the scales and shifts of the batch norms
    (`targets` narrows them) on how much classes go together in a batch, P (B, K) its probabilities:

        C = P^T P,   rows of C made to sum to 1,   L = (1 / K) sum_{i != j} C_ij

    (that normalisation is unconfirmed), with the gradient going through mu_t and s2_t. Answered is
    what the model said before the step.

    Trains nothing, or with `updates` those affines, whose source is kept once and comes back when
    the block is left. A batch of one picture has statistics over its places. alpha: 0.9 for
    segmentation, 0.7 to 0.9 for corruptions (unconfirmed).

    When: a shift of the inputs' statistics, at any batch size, with the source's as an anchor.
    When not: models without batch norm, which are refused.
    """

    paper: ClassVar[str] = ("Test-time Batch Statistics Calibration for Covariate Shift (2021), "
                            "arXiv:2110.04065")
    tier: ClassVar[str] = "from the text"

    alpha: float = setting(0.9, "share of the source's statistics")
    updates: int = setting(0, "Core steps on a batch; 0 moves statistics alone")
    step_rate: float = setting(1e-3, "learning rate of these updates")
    episodic: bool = setting(False, "every batch begins at the source")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha_bn: alpha is a share from 0 to 1, got {self.alpha:g}")
        if self.updates < 0 or not self.step_rate > 0:
            raise ConfigError("alpha_bn: updates of at least 0 and a positive step_rate are "
                              f"expected, got {self.updates} and {self.step_rate:g}")
        if idle := [n for n in ("step_rate", "episodic") if not self.updates
                    and n in self.changed()]:
            raise ConfigError(f"alpha_bn: {idle[0]} does nothing without updates")
        if not self.updates:
            untargeted(self, "statistics are mixed in every batch norm")
        if self.episodic and self.updates == 1:
            raise ConfigError("alpha_bn: an episodic batch answered before its only step has "
                              "learnt nothing: give updates=2 or more")

    def lifecycle(self, tuned: Any) -> Adapting:
        """The model, or what ``tune`` returned, as it answers a stream."""
        model = module_of(tuned)
        norms = remembering(model)
        if not norms:
            raise ConfigError("alpha_bn mixes the running statistics of batch norms, and this "
                              "model has none; tent moves norms of any kind, lame no weight")
        params = {} if not self.updates else {
            n: p for n, p in affines(self, tuned).items() if n.rpartition(".")[0] in norms}
        if self.updates and not params:
            raise ConfigError("alpha_bn: Core moves scales and shifts of batch norms, and there is "
                              "none; updates=0 mixes statistics alone")
        return Adapting("alpha_bn", model, params, lambda out: core(class_logits(out, "alpha_bn")),
                        AdamW(weight_decay=0.0), lr=self.step_rate, updates=self.updates,
                        episodic=self.episodic, alpha=self.alpha)


def core(logits: Tensor) -> Tensor:
    """How much the classes of a batch go together, from its logits (B, K)."""
    p = logits.softmax(1)
    C = together(p) / p.sum(0).clamp(min=torch.finfo(p.dtype).tiny)       # sums of rows of P^T P
    return (C.sum() - C.diagonal().sum()) / len(C)


def together(p: Tensor) -> Tensor:
    """``P^T P``, (B, K) -> (K, K)."""
    return p.t() @ p
