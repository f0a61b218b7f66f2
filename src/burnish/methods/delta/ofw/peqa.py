from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.term import Wrap
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Rescaled(Wrap):
    """``W'_og = (1 + d_og)_+ V_og``: d (out, groups), one number for `group` columns of a row."""

    def __init__(self, place: Place, group: int):
        super().__init__()
        self.group = min(group or place.inp, place.inp)
        self.d = nn.Parameter(torch.zeros(place.out, -(-place.inp // self.group)))

    def of(self, V: Tensor) -> Tensor:
        wide = torch.promote_types(V.dtype, self.d.dtype)    # near 1 a half has no steps so small
        f = (1 + self.d.to(wide)).clamp_min(0)
        if V.shape[-1] % self.group:                 # the last group is a short one
            return (V * f.repeat_interleave(self.group, -1)[:, : V.shape[-1]]).to(V.dtype)
        return (V.unflatten(-1, (-1, self.group)) * f.unsqueeze(-1)).flatten(-2).to(V.dtype)


@dataclass(frozen=True, kw_only=True)
class Peqa(Method):
    """PEQA: of a weight held in codes only the scales train.

    ``W' = (s + ds) (q - z) = (1 + d) * W``,  ds = s d,  one d for `group` columns of a row

    s, q and z are those of the storage beside it, which stay as they are (``nf4 + peqa``): q and z
    are the same for every task, and a task is its d. Trained relative to s, in fp32: a step of d
    is a share of each scale, whatever its size, and decay pulls to the scales that were. A scale
    that would be negative counts as zero, so no sign turns. Blocks of `nf4` have 64 columns where
    these divide a row; with another `group` several share a number, and with 0 a whole row does.

    Start: d = 0: the weights as they are held, exactly. Trains out * ceil(in / group) per matrix.
    Kept for backward: x. W' and its gradient are made for one layer at a time. Merges exactly into
    plain weights. Without a storage the groups of the weight itself are scaled. `qzo` is this by
    evaluations alone: ``nf4 + peqa(group=64) + mezo(g_max=100.0)``.

    Departures: codes and scales are whatever the storage makes of the weight, no search for the
    least error; the published grids are integers.
    """

    paper: ClassVar[str] = ("Memory-Efficient Fine-Tuning of Compressed Large Language Models via "
                            "sub-4-bit Integer Quantization, NeurIPS 2023, arXiv:2305.14152")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"group": 8}

    group: int = setting(64, "columns of a row that share a scale; 0: all of them", other=(0, 16))

    def __post_init__(self) -> None:
        if self.group < 0:
            raise RecipeError(f"peqa: group={self.group}: expected the columns that share a scale, "
                              "or 0 for a whole row")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Rescaled:
        return Rescaled(site.place, self.group)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return place.out * -(-place.inp // (self.group or place.inp))
