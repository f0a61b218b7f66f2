from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from ...blocks.state.gates import Affine, takes_shift
from ...core.asked import chosen
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

_SKIPPED = ("head", "router", "embed", "position", "type")


@dataclass(frozen=True, kw_only=True)
class Ssf(Method):
    """SSF: a learned scale and shift behind every linear, convolution and norm.

    ``h <- gamma * h + beta`` per channel; on maps (batch, channel, height, width) per channel of
    the map. FiLM is the same without its generator. A norm that has no shift (RMSNorm) gets the
    scale only, since a shift would have nowhere to fold; a linear without a bias gains one when
    it is merged.

    Start: gamma = 1, beta = 0, the pre-trained function exactly; ``init="author"`` draws gamma
    from N(1, 0.02^2) and beta from N(0, 0.02^2). Trains 2 channels per site: ViT-B/16 205,824.
    Kept for backward: h of every site; what the next operation wants is made again from it.
    Merges exactly: ``W <- diag(gamma) W``, ``b <- gamma * b + beta``, into a norm's own affine.

    No weight decay: it would pull gamma to zero instead of one. The projections inside
    ``nn.MultiheadAttention`` are read without a call and stay as they are. `targets` narrows it
    to some weights or norms.
    """

    paper: ClassVar[str] = "Scaling & Shifting Your Features (2022), arXiv:2210.08823"
    tier: ClassVar[str] = "checked against an independent equation"

    init: Literal["identity", "author"] = setting("identity", "start of gamma and beta")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        sites = {p.path: p.out for p in anatomy.places
                 if p.kind in ("linear", "conv1d", "conv") and p.param == "weight"
                 and p.role not in _SKIPPED}
        for path in anatomy.norms:
            if path not in anatomy.head:
                sites[path] = next(anatomy.model.get_submodule(path).parameters()).numel()
        if not sites:
            raise RecipeError("ssf: this model has no linear, convolution or norm to stand behind")
        named = chosen(anatomy, self, [f"{s}.weight" if s else "weight" for s in sites],
                       siblings=True)
        for path in (n.rpartition(".")[0] for n in named):
            module = anatomy.model.get_submodule(path)
            gate = Affine(sites[path], shift=takes_shift(module), axis=channel_axis(module),
                          spread=0.02 if self.init == "author" else 0.0)
            yield Branch(path, gate, compose="replace")

    @staticmethod
    def count(channels: int, shift: bool = True) -> int:
        """Trainable parameters of one site."""
        return (1 + shift) * channels


def channel_axis(module: nn.Module) -> int:
    """1 where the module's result is (batch, channel, ...), -1 where channels come last."""
    first = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    maps = getattr(module, "data_format", "") == "channels_first" \
        or type(module).__name__ == "LayerNorm2d"
    return 1 if isinstance(module, first) or maps else -1
