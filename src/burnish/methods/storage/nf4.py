"""NF4: see :class:`Nf4`."""

from __future__ import annotations

from dataclasses import dataclass

from ...blocks.weight.quantise import Nf4Provider
from ...core.method import Method, setting
from ...core.site import Site


@dataclass(frozen=True, kw_only=True)
class Nf4(Method):
    """QLoRA's NF4 -- frozen weights in 4-bit normal-float codes, decoded when used.

    Blocks of 64 entries: a = max|w|, index = nearest of 16 codes to w / a (quantiles of the normal
    law). With `double_quant` the a's are themselves 8-bit codes around their mean, in blocks of
    256. Forward y = x W'^T and backward dx = dy W' decode W' again: a temporary, never kept.

    Holds: 4.127 bits per weight (4.5 without double_quant). Trains: nothing. Step 0 is the
    *quantised* model. Applies to the matrices of linear layers, Conv1D and experts; embeddings,
    the head, norms and biases stay as they are. Merge: the update is added to the decoded weight
    and stays in the model's dtype; coding the sum again would lose it.

    QLoRA: Efficient Finetuning of Quantized LLMs, 2023. Codes and scales equal bitsandbytes'.
    """

    paper = "QLoRA: Efficient Finetuning of Quantized LLMs, 2023"
    tier = "checked against an independent equation"
    identity = False
    kinds = frozenset({"linear", "conv1d", "experts"})

    double_quant: bool = setting(True, "hold the block maxima in 8 bits too")

    def storage(self, site: Site) -> Nf4Provider | None:
        return None if site.place.role == "head" else Nf4Provider(site.weight, self.double_quant)

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights",)
