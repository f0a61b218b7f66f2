from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ...blocks.choose.views import entropies
from ...blocks.update.adapting import Adapting
from ...blocks.update.rules import SGD, AdamW
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import Adapts, affines, class_logits, module_of


@dataclass(frozen=True, kw_only=True)
class Tent(Adapts, Method):
    """TENT: a classifier answers a stream without labels, and its norms learn to be sure of it.

    Batch norms take the statistics of the batch, and per batch of B one step (`updates`) goes down

        L = (1/B) sum_i H(p_i),      H(p) = - sum_c p_c log p_c

    over the scales and shifts of the normalisation layers (`targets` narrows them) and nothing
    else. What is answered is what the model said before the step, so every sample is seen once::

        with burnish.parse("tent")[0].lifecycle(model) as adapted:       # or what tune() returned
            for batch in stream:
                outputs = adapted(batch)
            adapted.reset()                                # the source again, bit for bit

    Its baselines: ``alpha_bn(alpha=0.0)``, batch statistics alone; ``tent(guess=True)``, pseudo
    labels, whose loss is ``- log p_c`` of the likeliest class c.

    Start: with batch norms the first answer is not the source model's already, by the statistics;
    with layer norms alone it is. Trains 53,120 numbers of ResNet-50, 38,400 of ViT-B/16. The source
    of these is kept once; leaving the block gives it back.

    One sample at a time: ``tent(episodic=True, updates=2)``, every batch from the source; what a
    step did shows in the next forward, so two updates, or ``again=True``, which answers with a
    forward more. A batch norm then has the places of one picture.

    When not: small batches, or batches of one class after the other, draw all answers to one class.
    `doubt` below 1 leaves samples out of the step whose entropy is above that share of log K (not
    the paper's), `reset` begins anew, ``lame`` moves no weight at all.

    Published: Adam at 1e-3 for CIFAR-C (the defaults), ``tent(descent="sgd", step_rate=2.5e-4)``
    with momentum 0.9 for ImageNet-C; batches of 64 to 200. Where others run the model in training
    mode, only its batch norms do here: dropout stays off.
    """

    paper: ClassVar[str] = ("Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021, "
                            "arXiv:2006.10726")
    tier: ClassVar[str] = "checked against the paper's numbers"

    descent: Literal["adam", "sgd"] = setting("adam", "what a step is made by")
    step_rate: float = setting(1e-3, "learning rate of these updates")
    momentum: float = setting(0.9, "of sgd")
    updates: int = setting(1, "steps on one batch")
    guess: bool = setting(False, "the likeliest class in place of the entropy (pseudo labels)")
    doubt: float = setting(1.0, "entropy, as a share of log K, above which a sample is left out")
    episodic: bool = setting(False, "every batch begins at the source")
    again: bool = setting(False, "answer after the last step on a batch, with a forward more")

    def __post_init__(self) -> None:
        if self.updates < 1 or not self.step_rate > 0 or not 0 <= self.momentum < 1:
            raise ConfigError("tent: updates of at least 1, a positive step_rate and a momentum "
                              f"from 0 up to 1 are expected, got {self.updates}, "
                              f"{self.step_rate:g} and {self.momentum:g}")
        if not 0 < self.doubt <= 1:
            raise ConfigError(f"tent: doubt is a share above 0 and up to 1, got {self.doubt:g}")
        if self.descent not in ("adam", "sgd"):
            raise ConfigError(f"tent: descent={self.descent!r}: expected adam or sgd")
        if self.descent == "adam" and "momentum" in self.changed():
            raise ConfigError("tent: momentum is of descent='sgd'; adam has none")
        if self.episodic and self.updates == 1 and not self.again:
            raise ConfigError("tent: an episodic batch answered before its only step has learnt "
                              "nothing: give updates=2 or more, or again=True (alpha_bn(alpha=0.0) "
                              "takes its statistics and no step)")

    def lifecycle(self, tuned: Any) -> Adapting:
        """The model, or what ``tune`` returned, as it answers a stream."""
        model = module_of(tuned)
        rule = AdamW(weight_decay=0.0) if self.descent == "adam" else SGD(momentum=self.momentum)
        return Adapting("tent", model, affines(self, tuned), self.loss, rule, lr=self.step_rate,
                        updates=self.updates, episodic=self.episodic, after=self.again, alpha=0.0)

    def loss(self, outputs: Any) -> Tensor | None:
        """Of a batch's outputs; None where no sample is sure enough."""
        logits = class_logits(outputs, "tent")
        each = entropies(logits)
        if self.doubt < 1:
            stays = each.detach() <= self.doubt * math.log(logits.shape[1])
            if not bool(stays.any()):
                return None
            logits, each = logits[stays], each[stays]
        return F.cross_entropy(logits, logits.detach().argmax(1)) if self.guess else each.mean()
