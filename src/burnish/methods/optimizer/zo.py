from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.rules import SGD, AdamW, Lion, Rule, Sign
from ...blocks.update.zoo import Zoo
from ...core.errors import RecipeError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Zo(Method):
    """The zeroth-order zoo: first-order rules driven by two forwards, over parts and under masks.

        z ~ N(0, I),   g = (L(theta + eps z) - L(theta - eps z)) / (2 eps),   G = mean of g z
        theta <- theta - lr rule(G)                                decay of matrices as in `mezo`

    rule        step                                               kept, of p weights
    sgd         G                        (``mezo``)                0
    momentum    m <- 0.9 m + G,  m                                 p
    sign        sign(G), entry by entry                            0
    scalar      sign(g) z, as the authors' code has it             0
    adam        Adam's                                             2 p
    lion        sign(b1 m + (1 - b1) G)                            p
    cons        of theta, theta - lr g z and theta + lr g z the one whose loss on the batch is
                least: five evaluations                            0

    `one_sided` takes g from theta itself, (L(theta + eps z) - L(theta)) / eps. With
    ``unit="block"`` (or "module") the parts are probed and moved one after the other, each with
    noise of its own: two evaluations a part, and the variance of a part alone. With `s` that share
    of z is zero, drawn anew every `resample` updates; the mean of G is then (1 - s) of the
    gradient. With ``mask="global"`` the zeros of a tensor are as many as it has weights below the
    s-quantile of all |theta| (as they are at the first update), drawn among all its entries.
    ``measure="weights"`` probes z / d in each block, d the root mean square of its weights, "probe"
    |g| of that block alone, once, at the first update; d z is moved along (the mean is the
    gradient), or z itself with ``unbiased=False``, a gradient normalised by block.

    Start: the function as it is. Noise, scratch, objectives, schedules, rounding and the log that
    repeats a run: as in `mezo`; masks and sizes come back with it. Learning rates of 1e-8 to 1e-5
    are published for plain steps, up to 1e-4 with Adam, eps 1e-5 to 1e-3.
    """

    paper: ClassVar[str] = ("Revisiting Zeroth-Order Optimization for Memory-Efficient LLM "
                            "Fine-Tuning: A Benchmark, ICML 2024; Fine-Tuning Language Models with "
                            "Just Forward Passes, NeurIPS 2023")
    tier: ClassVar[str] = "checked against an independent equation"

    rule: Literal["sgd", "momentum", "sign", "scalar", "adam", "lion", "cons"] = setting(
        "sgd", "what is made of the estimate")
    eps: float = setting(1e-3, "radius of the probe; 1e-2 with LoRA, 1e-1 with prefixes")
    queries: int = setting(1, "probes averaged per update, two forwards each")
    one_sided: bool = setting(False, "probe on one side of the weights", alias=("one_side",))
    unit: Literal["whole", "block", "module"] = setting(
        "whole", "what is probed and moved together", alias=("module_wise",))
    s: float = setting(0.0, "share of entries that an update leaves as they are",
                       alias=("sparsity",))
    resample: int = setting(1, "updates between two masks", other=(5,), beside={"s": 0.5})
    mask: Literal["layer", "global"] = setting(
        "layer", "the same share of zeros in each tensor, or by the sizes of all weights",
        beside={"s": 0.5})
    measure: Literal["none", "weights", "probe"] = setting(
        "none", "what a block's share of the probe is measured by")
    unbiased: bool = setting(True, "the mean of a probe by size is the gradient",
                             beside={"measure": "weights"})
    weight_decay: float = setting(0.0, "decay of matrices, times lr")
    mode: Literal["scratch", "in_place"] = setting("scratch", "where the perturbed weights live")
    noise: Literal["device", "portable"] = setting(
        "device", "portable: the same z on every kind of device, about fifteen times slower")

    def __post_init__(self) -> None:
        if not self.unbiased and self.measure == "none":
            raise RecipeError("zo: unbiased=False asks for z instead of d z, and with "
                              "measure='none' d is 1; take measure='weights' or 'probe'")
        if self.resample != 1 and not self.s:
            raise RecipeError("zo: resample has no mask to draw with s=0")
        if self.mask != "layer" and not self.s:
            raise RecipeError("zo: mask='global' has no share of zeros to deal out with s=0")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> Zoo:
        rules: dict[str, Rule] = {"momentum": SGD(momentum=0.9), "sign": Sign(), "lion": Lion(),
                                  "adam": AdamW()}
        return Zoo(rule=rules.get(self.rule), scalar_sign=self.rule == "scalar",
                   conservative=self.rule == "cons", eps=self.eps, queries=self.queries,
                   one_sided=self.one_sided, unit=self.unit, sparsity=self.s,
                   resample=self.resample, mask=self.mask, size=self.measure,
                   unbiased=self.unbiased, mode=self.mode, noise=self.noise,
                   weight_decay=self.weight_decay)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        kept = {"momentum": 1, "lion": 1, "adam": 2}.get(self.rule, 0)
        return kept * math.prod(shape) * max(itemsize, 4)
