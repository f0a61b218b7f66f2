from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.gates import Affine, takes_shift
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import channel_axis, scaled

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


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
        for path, channels, module in scaled(anatomy, self):
            gate = Affine(channels, shift=takes_shift(module), axis=channel_axis(module),
                          spread=0.02 if self.init == "author" else 0.0)
            yield Branch(path, gate, compose="replace")

    @staticmethod
    def count(channels: int, shift: bool = True) -> int:
        """Trainable parameters of one site."""
        return (1 + shift) * channels
