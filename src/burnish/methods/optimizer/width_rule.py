from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...blocks.update.groups import Widths
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class WidthRule(Method):
    """The weight-decay scaling rule: lr and decay found on a narrow model serve a wide one.

        matrices of the blocks:           lr = lr0 d0 / d        wd = wd0 sqrt(d / d0)
        embeddings, head, norms, biases:  lr = lr0               wd = 0

    lr0 and wd0 are what the recipe's rule and its caller say (``adamw(weight_decay=0.1) +
    width_rule(proxy=256)``), found at width d0 = `proxy`; d is the width of this model's states.
    AdamW settles where singular values go as sqrt(lr / wd), here as d^-3/4, which keeps the gain
    of a layer. Not a gain in itself: it saves the search at the wide model.

    Start: the function as it is; nothing is kept beside the rule's own state. Decay is meant times
    lr, as every rule here has it. It takes about 1 / (lr wd) updates to settle: a run shorter than
    that never sees the law. Fixed points of other rules than Adam's differ.

    Our reading: what is no matrix of a repeated block counts as a vector, the head too. Factors of
    an update (LoRA's) inside blocks count as matrices; the source says nothing of them.
    """

    paper: ClassVar[str] = "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning, 2025"
    tier: ClassVar[str] = "from the text"
    small: ClassVar[dict[str, int]] = {"proxy": 16}

    proxy: int = setting(256, "width that lr and decay were found at", other=(8,))
    wide: int = setting(0, "width of this model; 0: as it says", other=(128,))

    def claims(self) -> tuple[str, ...]:
        return ("learning rates by width",)

    def optimizer(self) -> Widths:
        return Widths(proxy=self.proxy, width=self.wide)
