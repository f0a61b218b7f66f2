from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from ....blocks.state.attending import open_attentions
from ....blocks.weight.signed import OneBit, Signed
from ....core.anatomy import Anatomy
from ....core.method import Method, setting
from ....core.site import Site


@dataclass(frozen=True, kw_only=True)
class Bibert(Method):
    """BiBERT: weights, inputs and attention of one bit each.

    Linears: ``y = sign(x) W_b^T + b``, ``W_b = alpha sign(W - mean_o(W))``, mean_o over the inputs
    of an output and alpha the mean of |W| there. Attention: ``S = sign(q) sign(k)^T / sqrt(h) +
    mask``, ``P = 1[S > 0]``, ``P sign(v)``, no softmax: zero is the threshold that cuts symmetric
    scores in halves, which keeps the most information. sign(0) is 1. Gradients pass where a number
    (x, W - mean, q, k, v, a score) is inside (-1, 1) and are zero elsewhere; alpha is taken as it
    is. A score that attention's dropout takes is zero. Tables that are targeted have their entries
    in signs, one alpha and mean per token.

    Start: not the pre-trained function, from which it is far: begin with a model tuned to the task,
    and pull it to that one with ``direction_match`` and ``distill``:

        full + bibert + direction_match + distill

    Trains nothing itself (the latent weights of `full`, or a LoRA within the signs: ``lora +
    bibert``), so it saves nothing of what these hold. Kept for backward: two bits of each input,
    query, key and value; scores and signs of weights are made again. No merge: a plain module does
    not read signs. The head stays as it is. Deployed, a weight takes a bit, and a product is a
    count of differing bits (56.3 times fewer operations, 31.2 times smaller, in the paper).
    """

    paper: ClassVar[str] = ("BiBERT: Accurate Fully Binarized BERT (Qin et al., 2022), "
                            "arXiv:2203.06390")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding"})
    needs: ClassVar[frozenset[str]] = frozenset({"open attention"})
    shown_beside: ClassVar[str] = "lora(rank=4)"

    attention: bool = setting(True, "scores, queries, keys and values of one bit too")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",
                *(("how attention is computed",) if self.attention else ()))

    def delta(self, site: Site) -> Signed | None:
        if site.place.role == "head":
            return None
        return Signed(site.place.inp, 0 if site.place.kind == "embedding" else 1)

    def branch(self, anatomy: Anatomy) -> Iterable[Attention]:
        for path in open_attentions(anatomy, self.name) if self.attention else ():
            yield Attention(path)


@dataclass(frozen=True)
class Attention:
    """One attention on signs."""

    path: str

    def install(self, attacher: Any, part: Method) -> None:
        OneBit(attacher.state, attacher.adapter.name).listen(attacher.slot(self.path), part.name)
