from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.weight.term import Wrap
from ....core.method import Method, setting
from ....core.site import Place, Site


class Generalised(Wrap):
    """``W' = V + V * A + B``, entry by entry; A and B are products A_out A_in of (O, r) and (r, I),
    or columns (O, 1), or one number each (1,)."""

    def __init__(self, place: Place, form: str, rank: int):
        super().__init__()
        self.form = form
        for name in "AB":
            if form == "lora":
                bound = place.inp**-0.5
                into = torch.empty(rank, place.inp).uniform_(-bound, bound)
                self.register_parameter(f"{name}_in", nn.Parameter(into))
                self.register_parameter(f"{name}_out", nn.Parameter(torch.zeros(place.out, rank)))
            else:
                shape = (place.out, 1) if form == "vector" else (1,)
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def entries_of(self, name: str) -> Tensor:
        """A or B, as wide as it is made."""
        if self.form == "lora":
            made: Tensor = getattr(self, f"{name}_out") @ getattr(self, f"{name}_in")
            return made
        own: Tensor = getattr(self, name)
        return own

    def of(self, V: Tensor) -> Tensor:
        A, B = self.entries_of("A"), self.entries_of("B")
        wide = V.to(torch.promote_types(V.dtype, A.dtype))
        return (wide + (wide * A + B)).to(V.dtype)       # rounded once


@dataclass(frozen=True, kw_only=True)
class Glora(Method):
    """GLoRA: the weight is scaled and shifted at once, entry by entry.

    ``W' = W + W * A + B``. form="lora": A and B are products of (out, rank) and (rank, in);
    "vector": a number for each output, (out, 1); "constant": one number each.

    Start: the factors on the side of the outputs 0, those of the inputs uniform in +-1/sqrt(in);
    columns and numbers 0: the pre-trained function exactly. Trains 2 rank (in + out), 2 out or 2
    per matrix. Kept for backward: x; W' and its gradient are made for one layer at a time. Merges
    exactly.

    The paper's further parts move a bias, ``b' = b + b * D + E + W C``: left out, a bias stays as
    it is (`bitfit` beside it trains it, which is E, and with it all that D and C reach). The search
    for a form per layer is left out too: give parts different targets.
    """

    paper: ClassVar[str] = ("One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning "
                            "(2023), arXiv:2306.07967")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "rank of A and of B, where they are products", alias=("r",))
    form: Literal["lora", "vector", "constant"] = setting(
        "lora", "what A and B are", alias=("config_A_B",))

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Generalised:
        if self.form == "lora":
            site.place.check_rank(self.rank, "glora")
        return Generalised(site.place, self.form, self.rank)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        each = {"lora": self.rank * (place.inp + place.out), "vector": place.out, "constant": 1}
        return 2 * each[self.form]
