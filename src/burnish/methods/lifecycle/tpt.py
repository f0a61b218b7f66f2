from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks.choose.views import agreed, alike, rows_of, some, sure
from ...blocks.state.taps import evaluating
from ...blocks.update.lent import lent
from ...blocks.update.rules import AdamW
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ..objective.distill import logits_of


@dataclass(frozen=True, kw_only=True)
class Tpt(Method):
    """TPT: what trains is tuned to one test sample, without a label, and is itself again after it.

    x_1 the sample, x_2 ... x_N views of it (crops, flips, pictures drawn after it). Of these the
    share `confident` of least entropy is kept (at least one), and `updates` of AdamW minimise

        H(mean of p_n over the kept views),   H(p) = - sum_c p_c log p_c

    over everything that trains; x_1 is answered there, and all comes back bit for bit::

        method = burnish.parse("tpt")[0]
        for views in samples:                      # a batch of N views, the sample first
            outputs = method.lifecycle(tuned, views)       # what the model says of the sample

    views: a mapping whose ``pixel_values`` has a row a view (`over` names other keys); what else it
    holds (a text a class) goes to every run. The model answers in evaluation mode.

    DiffTPT is ``tpt(confident=0.3, similar=0.8, updates=4)`` (shares and updates unconfirmed) with
    the last `made` rows drawn by a diffusion model: of those only the share `similar` stays whose
    features are nearest to the sample's, the outputs' ``image_embeds`` or what `features` makes of
    the outputs.

    Trains what the recipe trains: a prompt, as published (``coop``, ``vpt``, ...; four tokens from
    "a photo of a", 2,048 numbers). Takes a forward of N views without a graph, then, a step, a
    forward and backward of the kept ones alone (their choice has no gradient, and in evaluation
    mode no view has a say in another), and the answer's forward. Moments begin anew with every
    sample, so the order of samples has no part in it; ``.grad``, optimizer, random generators and
    running statistics stay as they are.
    """

    paper: ClassVar[str] = ("Test-Time Prompt Tuning for Zero-Shot Generalization in "
                            "Vision-Language Models, NeurIPS 2022, arXiv:2209.07511; Diverse Data "
                            "Augmentation with Diffusions for Effective Test-time Prompt Tuning, "
                            "ICCV 2023, arXiv:2308.06038")
    tier: ClassVar[str] = "checked against an independent equation"

    confident: float = setting(0.1, "share of the views that is kept, of least entropy")
    similar: float = setting(1.0, "share of the made views that may be kept, nearest first")
    updates: int = setting(1, "of AdamW on one sample")
    step_rate: float = setting(5e-3, "learning rate of these updates")
    weight_decay: float = setting(0.01, "of AdamW, times the rate")

    def __post_init__(self) -> None:
        if not (0 < self.confident <= 1 and 0 < self.similar <= 1):
            raise ConfigError("tpt: confident and similar are shares above 0 and up to 1, got "
                              f"{self.confident:g} and {self.similar:g}")
        if self.updates < 1 or self.step_rate <= 0 or self.weight_decay < 0:
            raise ConfigError("tpt: updates of at least 1, a positive step_rate and a weight_decay "
                              f"of at least 0 are expected, got {self.updates}, "
                              f"{self.step_rate:g} and {self.weight_decay:g}")

    def lifecycle(self, tuned: Any, views: Mapping[str, Any], *, over: Sequence[str] | None = None,
                  made: int = 0, features: Callable[[Any], Tensor] | None = None) -> Any:
        """The model's outputs for the first view, after the steps on all of them."""
        keys, n = rows_of(views, over)
        if not 0 <= made < n:
            raise ConfigError(f"tpt: made={made} of {n} views: the first is the sample itself")
        params = dict(tuned.named_parameters())
        if not params:
            raise ConfigError("tpt: nothing trains just now; tuned.use(name) for one adapter alone")
        with evaluating([m for m in tuned.model.modules() if m.training]):
            kept = some(views, keys, self._kept(tuned, views, made, features))

            def gradients() -> Mapping[str, Tensor]:
                return tuned.probe(kept, lambda out, _: agreed(logits_of(out, "tpt"))).grads

            rule = AdamW(weight_decay=self.weight_decay)
            with lent(params, gradients, self.updates, self.step_rate, rule), torch.no_grad():
                return tuned.model(**some(views, keys, torch.tensor([0])))

    @torch.no_grad()
    def _kept(self, tuned: Any, views: Mapping[str, Any], made: int,
              features: Callable[[Any], Tensor] | None) -> Tensor:
        """Indices of the views that are sure, and near where they were made."""
        out = tuned.model(**views)
        kept = sure(logits_of(out, "tpt"), self.confident)
        if not made:
            return kept
        seen = getattr(out, "image_embeds", None) if features is None else features(out)
        if seen is None:
            raise ConfigError("tpt: views that were made are kept by their features, and these "
                              "outputs have no image_embeds: give features=lambda outputs: ...")
        stays = alike(seen, made, self.similar)[kept]
        return kept[stays] if bool(stays.any()) else torch.tensor([0], device=kept.device)
