"""A picture that is drawn on before the model sees it: a small decoder makes what is added to it.

    z (B, d)            what a frozen encoder says of the picture
    [z; t]              with a trainable trigger t of width 32 s^2 - d: a map (B, 32, s, s)
    h (B, C, 32 s, 32 s)  five transposed convolutions, each doubling the map's sides
    x' = clip(x + eps h)  to the pixels there are

The model is not looked into: x' stands in its arguments in the place of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.call import resume
from ...core.errors import RecipeError
from ..tape.cast import uncast
from .prompts import Listener
from .taps import evaluating

#: channels of the map that z and the trigger fill, and behind each doubling but the last
CHANNELS = (32, 64, 32, 32, 16)


def doubling(inp: int, out: int) -> list[nn.Module]:
    """A map of twice the sides: each channel by itself with kernels of 2 x 2, then 1 x 1."""
    wide = max(inp, out)
    return [nn.ConvTranspose2d(inp, wide, 2, 2, groups=inp),
            nn.ConvTranspose2d(wide, out, 1, bias=False), nn.BatchNorm2d(out), nn.GELU()]


class Coordinator(nn.Module):
    """z (B, width) -> h (B, channels, 32 side, 32 side), with a trigger of 32 side^2 - width.

    Its batch norms take a batch's statistics wherever it is trained, by evaluations too.
    """

    moves_by_passing = True

    def __init__(self, width: int, side: int, channels: int):
        super().__init__()
        self.side = side
        self.trigger = nn.Parameter(torch.empty(CHANNELS[0] * side**2 - width).uniform_(0, 0.1))
        body = [m for a, b in zip(CHANNELS, CHANNELS[1:], strict=False) for m in doubling(a, b)]
        self.body = nn.Sequential(*body, nn.ConvTranspose2d(CHANNELS[-1], channels, 2, 2,
                                                            bias=False))

    def forward(self, z: Tensor) -> Tensor:
        with uncast(z):
            z = z.to(self.trigger.dtype)
            cube = torch.cat([z, self.trigger.expand(len(z), -1)], 1)
            return self.body(cube.view(len(z), CHANNELS[0], self.side, self.side))


class Drawn(Listener):
    """Listens to the model: its pictures are replaced by ``clip(x + eps h(z))``.

    encoder: a module of the model that answers for z; None: the model itself, run once more before
    it is asked, as its `heard` block says. Both run without a graph, in evaluation mode, with
    nothing of a recipe. h is resized (bilinearly) to pictures of another size than 32 side.
    low, high: (C,) the pixels there are.
    """

    what = "a prompt in the picture"

    def __init__(self, state: Any, adapter: str, coordinator: Coordinator, eps: float,
                 low: Sequence[float], high: Sequence[float], encoder: nn.Module | None,
                 read: Callable[[Any], Tensor]):
        super().__init__(state, adapter)
        self.coordinator, self.eps, self.read = coordinator, eps, read
        self.__dict__["encoder"] = encoder           # the model's own, no child of this one
        self.low, self.high = list(low), list(high)

    def around(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        where = picture_of(args, kw)
        x = args[where] if isinstance(where, int) else kw[where]
        if x.shape[1] != len(self.low):
            raise RecipeError(f"blackvip draws on pictures of {len(self.low)} channels, and is "
                              f"given {tuple(x.shape)}: give pixel_mean and pixel_std of as many")
        h = self.coordinator(self.seen(module, call, x, args, kw)).to(x.dtype)
        if h.shape[-2:] != x.shape[-2:]:
            h = F.interpolate(h, size=x.shape[-2:], mode="bilinear", align_corners=False)
        low, high = (x.new_tensor(v).view(-1, 1, 1) for v in (self.low, self.high))
        drawn = torch.clamp(x + self.eps * h, low, high)
        if isinstance(where, int):
            return call(*args[:where], drawn, *args[where + 1:], **kw)
        return call(*args, **{**kw, where: drawn})

    @torch.no_grad()
    def seen(self, module: nn.Module, call: Callable[..., Any], x: Tensor, args: tuple,
             kw: dict[str, Any]) -> Tensor:
        """z, of a run with nothing of the recipe."""
        runs = module if self.encoder is None else self.encoder
        own = self.here.inner(off=True, base=self.state.base_of(module))
        mine = set(self.modules())
        with evaluating([m for m in runs.modules() if m.training and m not in mine]), resume(own):
            if self.encoder is not None:
                return self.read(self.encoder(x))
            call(*args, **kw)
            return self.read(own.box.pop(Heard))


class Heard(Listener):
    """Listens to a block: what it answers is left for :class:`Drawn`, also when switched off."""

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        out = call(*args, **kw)
        if self.here.off:
            self.here.box[Heard] = out
        return out


def picture_of(args: tuple, kw: dict[str, Any]) -> int | str:
    """Which argument is the picture: ``pixel_values``, or the first of four dimensions."""
    found = [*enumerate(args), *sorted(kw.items(), key=lambda item: item[0] != "pixel_values")]
    for where, value in found:
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return where
    raise RecipeError("blackvip draws on pictures (batch, channels, height, width), and the model "
                      "was given none")


def features(out: Any, width: int, first: bool) -> Tensor:
    """(B, width) of what an encoder answers: itself, its first token, or the mean of its map."""
    if not isinstance(out, Tensor):
        out = out[0] if isinstance(out, tuple) else out.last_hidden_state
    if width not in (out.shape[-1], out.shape[1]):
        raise RecipeError(f"blackvip: its encoder answers {tuple(out.shape)}, which has no axis of "
                          f"{width}: say how wide it is, encoder_width=...")
    if out.dim() == 2:
        return out
    if out.shape[-1] == width:
        return out[:, 0] if first and out.dim() == 3 else out.flatten(1, -2).mean(1)
    return out.flatten(2).mean(-1)
