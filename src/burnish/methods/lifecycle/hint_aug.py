from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.choose.patches import Maps, chosen, mistaken, spread
from ...blocks.state.taps import evaluating
from ...blocks.update.rules import AdamW
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.needs import patches as patch_places
from ..objective.distill import logits_of

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class HintAug(Method):
    """Hint-Aug: patches that a tuned vision transformer over-fits are redrawn with what the
    pre-trained one mistakes the class for.

        t, s     attention to each patch in block `layer`, mean over heads and queries, of length
                 1: of the model before tuning, and as it is tuned now
        chosen   of each sample `patches`: the largest t - s where max |t - s| > limit, else the
                 largest s
        c_y      softmax of row y of the pre-trained model's confusion matrix, its diagonal 0
        delta    in the chosen patches alone: from pixels drawn at random, `updates` of Adam that
                 lower CE(f(x + delta), c_y), within the pixels there are
        train    on (x + delta, y)

    The teacher is the model itself without what was added. Through `tuned.step`::

        method = burnish.parse("hint_aug")[0]
        likely = method.lifecycle(tuned, batches)        # c, (C, C), once, of the training classes
        tuned.step(batch)                                # step 1, as ever (mixup, ...)
        method.step(tuned, batch, likely)                # step 2, on the augmented batch

    batch: ``labels`` (B,) and a picture (``pixel_values``, or the first tensor of four
    dimensions). Published: from epoch 20 on, every batch, as a second step; about three times the
    time of tuning. Takes the teacher's forward, one of the tuned model to look and one forward and
    backward to the pixels, beside the step. Attention of block `layer` alone is computed twice, so
    fused kernels stay; its attention must call ``F.scaled_dot_product_attention`` over all patches.

    For what is tuned of a plain vision transformer (adapter, lora, vpt). Departure: the published
    attack's target appears to be zero everywhere, without a gradient; this is the text's.
    """

    paper: ClassVar[str] = ("Hint-Aug: Drawing Hints from Foundation Vision Transformers Towards "
                            "Boosted Few-Shot Parameter-Efficient Tuning, CVPR 2023, "
                            "arXiv:2304.14520")
    tier: ClassVar[str] = "checked against an independent equation"

    layer: int = setting(4, "block whose attention is looked at, from 0")
    patches: int = setting(2, "redrawn of each picture")
    limit_of_change: float = setting(0.7, "of attention, from where on lost patches are chosen")
    pixel_rate: float = setting(0.1, "of the updates of delta")
    pixel_updates: int = setting(1, "of delta")
    least_pixel: float = setting(-1.0, "smallest pixel there is, as the model is given it")
    largest_pixel: float = setting(1.0, "largest pixel there is")

    def __post_init__(self) -> None:
        if self.layer < 0 or self.patches < 1 or self.pixel_updates < 1 or self.pixel_rate <= 0:
            raise ConfigError("hint_aug: layer of at least 0, patches and pixel_updates of at "
                              f"least 1 and a positive pixel_rate are expected, got {self.layer}, "
                              f"{self.patches}, {self.pixel_updates} and {self.pixel_rate:g}")
        if not self.least_pixel < self.largest_pixel:
            raise ConfigError(f"hint_aug: pixels are between {self.least_pixel:g} and "
                              f"{self.largest_pixel:g}, which leaves none")

    @torch.no_grad()
    def lifecycle(self, tuned: Any, batches: Iterable[Mapping[str, Any]]) -> Tensor:
        """c (C, C): for each class what the model before tuning mistakes it for."""
        total: Any = 0
        with evaluating([m for m in tuned.model.modules() if m.training]), tuned.disabled():
            for batch in batches:
                z = logits_of(tuned.model(**batch), "hint_aug")
                total = total + mistaken(z, batch["labels"], z.shape[1])
        if not isinstance(total, Tensor):
            raise ConfigError("hint_aug: no batch to read the confusions of")
        return total.softmax(1)

    def step(self, tuned: Any, batch: Mapping[str, Any], likely: Tensor,
             loss: Loss | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A training step on the augmented batch; the loss."""
        return tuned.step(self.augmented(tuned, batch, likely, generator), loss)

    def augmented(self, tuned: Any, batch: Mapping[str, Any], likely: Tensor,
                  generator: torch.Generator | None = None) -> dict[str, Any]:
        """The batch with its chosen patches redrawn."""
        key = next((k for k in ("pixel_values", *batch) if isinstance(batch.get(k), Tensor)
                    and batch[k].dim() == 4), None)
        if key is None:
            raise ConfigError("hint_aug redraws pictures (batch, channels, height, width), and "
                              f"{', '.join(batch)} holds none")
        given = {k: v for k, v in batch.items() if k != "labels"}
        x, target = batch[key], likely[batch["labels"]]
        with evaluating([m for m in tuned.model.modules() if m.training]):
            here = self._chosen(tuned, given, x)
            u = torch.rand(x.shape, generator=generator, device=x.device).to(x.dtype)
            low, high = self.least_pixel, self.largest_pixel
            delta = here * (low + (high - low) * u - x)
            rule = AdamW()                           # whose direction has no decay in it
            state = rule.init(delta)
            for t in range(1, self.pixel_updates + 1):
                made = delta.requires_grad_()
                z = logits_of(tuned.model(**{**given, key: x + made}), "hint_aug")
                wide = torch.promote_types(z.dtype, torch.float32)
                value = F.cross_entropy(z.to(wide), target.to(wide))
                (g,) = torch.autograd.grad(value, made)
                with torch.no_grad():
                    u = rule.direction(g.to(state["exp_avg"].dtype), state, t, rule.hyper())
                    delta = here * (delta - self.pixel_rate * u.to(x.dtype))
                    delta = (x + delta).clamp(low, high) - x
                    delta = here * delta
        return {**batch, key: (x + delta).detach()}

    @torch.no_grad()
    def _chosen(self, tuned: Any, given: Mapping[str, Any], x: Tensor) -> Tensor:
        """(B, 1, H, W) of 0 and 1."""
        places, blocks = patch_places(tuned.anatomy), tuned.anatomy.blocks
        if len(places) != 1 or self.layer >= len(blocks) or not blocks[self.layer].attn:
            raise ConfigError(f"hint_aug(layer={self.layer}) looks at the attention of that block "
                              "behind one convolution that cuts pictures into patches; "
                              f"{type(tuned.model).__name__} has {len(blocks)} blocks and "
                              f"{len(places)} such convolutions")
        module = tuned.model.get_submodule(blocks[self.layer].attn)
        size = tuned.model.get_submodule(places[0].path).kernel_size
        n = (x.shape[2] // size[0]) * (x.shape[3] // size[1])
        with Maps(module) as maps, tuned.disabled():
            tuned.model(**given)
        before = maps.map(n)
        with Maps(module) as maps:
            tuned.model(**given)
        mask = chosen(before, maps.map(n), self.patches, self.limit_of_change)
        return spread(mask, x.shape, size).to(x.dtype)
