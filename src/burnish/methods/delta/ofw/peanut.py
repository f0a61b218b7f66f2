from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.state.bottleneck import activation
from ....blocks.weight.gleaned import Gleaned
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Tweaked(Gleaned):
    """``W' = V + s B H``, H (r, in) made of V column by column by a small network."""

    def __init__(self, place: Place, rank: int, depth: int, act: str, scale: float):
        super().__init__()

        def drawn(inp: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rank, inp).uniform_(-inp**-0.5, inp**-0.5))

        self.A, self.B = drawn(place.out), nn.Parameter(torch.zeros(place.out, rank))
        self.encoders = nn.ParameterList(drawn(rank) for _ in range(depth))
        self.decoders = nn.ParameterList(drawn(rank) for _ in range(depth))
        self.act, self.scale = activation(act), scale
        for p in self.parameters():
            p.burnish_decay = False

    def factors(self, V: Tensor) -> tuple[Tensor, Tensor]:
        h, left = self.act(self.A.to(V.dtype) @ V), []
        for E in self.encoders:
            left.append(h)
            h = self.act(E.to(V.dtype) @ h)
        for D in self.decoders:
            h = self.act(D.to(V.dtype) @ h) + left.pop()
        return h, self.B * self.scale


@dataclass(frozen=True, kw_only=True)
class Peanut(Method):
    """PEANuT: a small network reads the weight and says how it is to change.

    ``W' = W + s B H``, ``H = act(A W)`` (rank, in) with A (rank, out), B (out, rank); `encoders`
    adds so many ``H <- act(E_i H)``, and as many decoders ``H <- act(D_i H) + (the H before the
    encoder it mirrors)``, E_i and D_i (rank, rank). (The paper writes W transposed. Its activation
    is not fixed; ReLU and s = 1 are PEFT's defaults, and its residuals of decoders are followed.)

    Start: A, E, D uniform in +-1/sqrt(columns), B = 0: the pre-trained function exactly. Trains
    2 rank out + 2 encoders rank^2 per matrix. Kept for backward: x and rank numbers per token, as
    LoRA, with H and s B beside them. H is made once a forward and once more in backward, 3 rank in
    out products a step beside the tokens': 1.5 times LoRA's of that rank at n = out tokens, less
    with more. Merges exactly, exports as plain LoRA too. No weight decay.
    """

    paper: ClassVar[str] = ("PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural "
                            "Tweakers (2024), arXiv:2410.01870")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(32, "rank of the update", alias=("r",))
    encoders: int = setting(0, "of the network, and as many decoders", other=(2,))
    act: Literal["relu", "gelu", "silu", "tanh"] = setting("relu", "between its layers",
                                                           alias=("act_fn",))
    scale: float = setting(1.0, "s", alias=("scaling",))

    def __post_init__(self) -> None:
        if self.encoders < 0:
            raise RecipeError(f"peanut: encoders={self.encoders}: expected at least 0")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Tweaked:
        site.place.check_rank(self.rank, "peanut")
        return Tweaked(site.place, self.rank, self.encoders, self.act, self.scale)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def per_forward(self, place: Place) -> int:
        """Numbers kept of the matrix whatever the tokens: H and s B."""
        return self.rank * (place.inp + place.out)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return 2 * self.rank * (place.out + self.encoders * self.rank)
