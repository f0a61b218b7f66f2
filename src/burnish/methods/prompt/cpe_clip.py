from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...blocks.update.damped import Damped
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import towers
from .maple import check_layers, stand_in_both

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class CpeClip(Method):
    """CPE-CLIP: coupled prompts in the first blocks of both towers, whose updates count for less
    the more classes came before.

    Text rows G_i (length, d_t) stand behind the first token in block i of the first `layers`, in
    the place of as many placeholders; behind the pictures' patches stand ``G_i W^T + b``, one W
    (d_v, d_t) for all blocks; both are fresh in each block (see `maple`). In session s of a stream
    of classes, `sessions` = (|C_1|, .., |C_s|), every update of them counts lambda times:

        lambda = |C_s| / sum_{j <= s} |C_j|,      60 base classes and 5 more: 5 / 65

    It is the update that is damped, since Adam would divide a damped gradient out again: with SGD
    both are one (of its weight decay too). A loss of session s is among its own classes alone: the
    learner ``cpe_clip`` of ``burnish.continual`` does so and counts sessions by itself.

    Start: G Xavier-uniform over (layers, length, d_t), W and b as linears start: never the
    pre-trained function. Trains layers length d_t + d_t d_v + d_v: 406,272 on CLIP ViT-B/16. Kept
    for backward: as `maple`. Not mergeable. A finished file holds the rows of both sides.

    The authors: SGD at 3.25e-3, momentum 0.9, cosine restarts; batches of 4, 5 epochs a session.
    Departure: their first pictures' rows pass the norm before the blocks.
    """

    paper: ClassVar[str] = ("Multimodal Parameter-Efficient Few-Shot Class Incremental Learning "
                            "(2023), arXiv:2303.04751")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"two towers"})
    of_task: ClassVar[frozenset[str]] = frozenset({"sessions"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"layers": 2}

    length: int = setting(2, "rows per block", alias=("L_g",))
    layers: int = setting(12, "how many of the first blocks", alias=("deep_g",), other=(1,))
    sessions: tuple[int, ...] | list[int] = setting(
        (), "classes of each session so far, this one's last; none: it is the first",
        other=((3, 1),))
    coupled: bool = setting(True, "rows of pictures are made of those of texts")

    def __post_init__(self) -> None:
        if min(self.length, self.layers, *self.sessions) < 1:
            raise RecipeError(f"cpe_clip(length={self.length}, layers={self.layers}, sessions="
                              f"{self.sessions}): expected at least one row, one block and "
                              "sessions of one class")

    @property
    def relies_on(self) -> tuple[str, ...]:          # type: ignore[override]
        return ("gradients",) if self.factor != 1 else ()

    @property
    def factor(self) -> float:
        """lambda."""
        return self.sessions[-1] / sum(self.sessions) if self.sessions else 1.0

    def repeats(self) -> int | None:
        return None

    def prompt(self, anatomy: Anatomy) -> CpeClip:
        check_layers(self, anatomy)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        d = attacher.model.get_submodule(towers(attacher.anatomy).table).embedding_dim
        rows = torch.nn.init.xavier_uniform_(torch.empty(self.layers, self.length, d))
        stand_in_both(attacher, part, list(rows), self.coupled, share=True)

    def controller(self, tuned: Tuned) -> Any:
        name = getattr(tuned, "training", None) or next(iter(tuned.adapters))
        return Damped([p for n, p in tuned.named_parameters()
                       if f".burnish.{name}.{self.name}." in n], self.factor) \
            if self.factor != 1 else None

    def finished(self) -> CpeClip:
        return replace(self, coupled=False)

    def count(self, d: int, out: int) -> int:
        """Trainable parameters at text width d, pictures of width `out`."""
        rows = self.layers * self.length
        return rows * d + (d * out + out if self.coupled else rows * out)
