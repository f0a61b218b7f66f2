from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.coordinator import CHANNELS, Coordinator, Drawn, Heard, features
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import behind_patches
from .vpt import special_tokens

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

#: of CLIP's pixels
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Blackvip(Method):
    """BlackVIP: a small coordinator draws on each picture before a model that stays closed.

    ``x' = clip(x + scale h(z))``: z (B, d) from a frozen encoder, a trainable trigger t fills it up
    to 32 m^2 numbers, seen as a map (32, m, m), m = `map_side`; five transposed convolutions of
    stride 2 (a 2 x 2 kernel a channel, then 1 x 1, batch norm, GELU; the last alone) 32 -> 64 ->
    32 -> 32 -> 16 -> C make h of 32 m x 32 m. clip is to the pixels there are, 0 to 1 less
    `pixel_mean`, over `pixel_std`. Nothing is put into the model: it is given another picture.

    As published it is trained by `spsa_gc`, through numbers that a service may give:
    ``tune(model, "blackvip + spsa_gc")``, ``tuned.optimizer(lr=0.01)``, ``tuned.step(batch)``. With
    any other update gradients come through the model (``blackvip + adamw``). Where the model is
    one's own wrapper around a service, it holds the encoder as a child: ``encoder="mae"``.

    Start: t ~ U(0, 0.1), convolutions as torch has them: not the pre-trained function. Trains
    32 m^2 - d + 9,120 (d = 768, m = 7: 9,920); the encoder does not. Not mergeable. Batch
    norms take the batch's statistics in training, in both evaluations of a probe too. Takes one
    forward of the encoder more.

    Departures: without `encoder` z is what the model's own last block says of the picture (class
    token, or the mean of its tokens), for the published MAE ViT-B; h is resized bilinearly where
    pictures are not of 32 m x 32 m.
    """

    paper: ClassVar[str] = ("BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning, "
                            "CVPR 2023, arXiv:2303.14773")
    tier: ClassVar[str] = "checked against the paper's numbers"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    small: ClassVar[dict[str, int]] = {"map_side": 2}

    scale: float = setting(1.0, "how strongly it draws")
    map_side: int = setting(7, "sides of the map that z and the trigger fill", other=(3,))
    encoder: str | None = setting(None, "path of a module in the model that answers for z; None: "
                                  "the model itself", unseen="its answer is another module's: "
                                  "tests/methods/test_blackvip.py")
    encoder_width: int | None = setting(None, "d, where the encoder's config does not say it",
                                   unseen="it has a meaning only beside encoder: "
                                          "tests/methods/test_blackvip.py")
    pixel_mean: tuple[float, ...] = setting(_MEAN, "of the pixels, by channel")
    pixel_std: tuple[float, ...] = setting(_STD, "of the pixels, by channel")

    def __post_init__(self) -> None:
        if self.scale <= 0 or self.map_side < 1:
            raise RecipeError("blackvip: scale is positive and map_side at least 1, got "
                              f"{self.scale:g} and {self.map_side}")
        mean, std = self.pixel_mean, self.pixel_std
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise RecipeError("blackvip: pixel_mean and pixel_std have one number a channel, the "
                              f"latter positive; got {mean} and {std}")
        if self.encoder_width is not None and self.encoder is None:
            raise RecipeError("blackvip: encoder_width says how wide `encoder` answers, and "
                              "there is none; leave it out")

    def prompt(self, anatomy: Anatomy) -> Blackvip:
        if self.targets is not None:
            raise RecipeError("blackvip takes no targets: it stands before the whole model")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        model, anatomy, name = attacher.model, attacher.anatomy, attacher.adapter.name
        if self.encoder is None:
            stacks = behind_patches(anatomy)
            if not stacks:
                raise RecipeError("blackvip: this model has no blocks behind a patch convolution "
                                  "to look at pictures with; give it an encoder, encoder='path'")
            encoder, block = None, stacks[-1][-1]
            width, first = block.hidden_size, special_tokens(model, block.stack) > 0
            Heard(attacher.state, name).listen(attacher.slot(block.path), part.name)
        else:
            encoder, first = self._module(model), True
            config = getattr(encoder, "config", None)
            width = self.encoder_width or getattr(config, "hidden_size", None)
        if not width:
            raise RecipeError("blackvip: the width of what the encoder answers cannot be told; say "
                              "it, encoder_width=...")
        if width >= (size := CHANNELS[0] * self.map_side**2):
            raise RecipeError(f"blackvip(map_side={self.map_side}): z alone has {width} numbers, "
                              f"and the map {size}: take a larger map_side")
        made = Coordinator(width, self.map_side, len(self.pixel_mean)).to(attacher.device(""))
        low, high = ([(v - m) / s for m, s in zip(self.pixel_mean, self.pixel_std, strict=True)]
                     for v in (0.0, 1.0))
        read = functools.partial(features, width=width, first=first)
        Drawn(attacher.state, name, made, self.scale, low, high, encoder, read
              ).listen(attacher.slot(""), part.name)

    def _module(self, model: Any) -> Any:
        try:
            return model.get_submodule(self.encoder)
        except AttributeError:
            raise RecipeError(f"blackvip(encoder={self.encoder!r}): the model has no module of "
                              "that path") from None

    def count(self, width: int) -> int:
        """Trainable parameters where z has this width."""
        return CHANNELS[0] * self.map_side**2 - width + 9120 + 64 * (len(self.pixel_mean) - 3)

    def repeats(self) -> int | None:
        return None                              # the last block is heard
