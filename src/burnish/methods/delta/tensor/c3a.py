from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ....blocks.weight.circulant import Circulant
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class C3a(Method):
    """C3A: the update is made of circulant blocks, so that a whole block is one vector.

    ``W' = W + [C(w_mn)] / in``, w (out / block, in / block, block): C(w) is the (block, block)
    matrix whose first row is w and each next row the one above turned by one to the right; its rank
    is that of w's spectrum, up to block, whatever trains. Tokens meet it through Fourier transforms
    of their runs: about ``tokens (2 in out / block + 20 (in + out))`` operations, none of the
    weight's size. The factor 1 / in is PEFT's and the authors' code; the paper writes none (a
    learning rate of a tenth or more goes with it).

    Start (`init`): "xavier" w uniform in +-sqrt(6 / (in + out)), "kaiming" in +-1/sqrt(in),
    "normal" N(0, 1): step 0 is *not* the pre-trained function, the factor makes it nearly so;
    "zero" starts at w = 0, which is. Trains in out / block per matrix. Kept for backward: x; the
    path runs again there. Merges exactly. No weight decay. `block` divides in and out.

    Gradients are those of the function; PEFT 0.21 hands on to x and to w those of another (it
    turns one of its transforms the wrong way round), so runs differ from PEFT's, outputs do not.
    """

    paper: ClassVar[str] = ("Parameter-Efficient Fine-Tuning via Circular Convolution (2024), "
                            "arXiv:2407.19342")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"block": 8}

    block: int = setting(256, "side of a circulant block", alias=("block_size",), other=(4,))
    init: Literal["xavier", "kaiming", "normal", "zero"] = setting(
        "xavier", "start of the kernels", alias=("init_weights",))

    def __post_init__(self) -> None:
        if self.block < 1:
            raise RecipeError(f"c3a: block={self.block}: expected at least 1")

    def delta(self, site: Site) -> Circulant:
        place, b = site.place, self.block
        if place.out % b or place.inp % b:
            fits = [n for n in (2, 4, 8, 16, 32, 64, 128, 256)
                    if not (place.out % n or place.inp % n)]
            raise RecipeError(f"c3a: block={b} does not divide {place.name} ({place.out} x "
                              f"{place.inp}); {', '.join(map(str, fits)) or 'none'} would")
        w = torch.zeros(place.out // b, place.inp // b, b)
        if self.init == "normal":
            w.normal_()
        elif self.init != "zero":
            bound = place.inp**-0.5 if self.init == "kaiming" else \
                (6 / (place.inp + place.out))**0.5
            w.uniform_(-bound, bound)
        return Circulant(w, 1 / place.inp)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return place.out * place.inp // self.block
