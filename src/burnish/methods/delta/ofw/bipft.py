from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ....blocks.choose.inputs import MeanSize
from ....blocks.state.attending import open_attentions
from ....blocks.state.estimated import Estimated, Sizes
from ....blocks.weight.elastic import SIGNED, Centred, Elastic
from ....core.anatomy import Anatomy
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Bipft(Method):
    """BiPFT: weights, inputs and attention of one bit, and estimates of what the bits leave out.

    Linears: ``y = a sign(x) W_b^T + b``, ``W_b = m_o sign(W - mean(W))``, m_o the mean of |W| over
    an output's inputs. Attention, x (tokens, d) what it reads, h the width of a head:

        S = (q_b k_b^T + m_q p_k^T + p_q m_k^T + p_q p_k^T) / sqrt(h) + mask
        P = a clamp(round(softmax(S) / a), 0, 1),   context = P (v_b + r)

    q_b, k_b, v_b = a sign(q), ...; m_q, p_q, m_k, p_k (tokens, `rank`) and r (tokens, 1) are
    linears of x with biases, the same for all heads: with p what the bits leave out of q and k, and
    m the bits, S is exact. Each a is one number that trains, at least 1e-5: ``da = sum dy sign(x) /
    sqrt(numel)`` (of P the learned step size's), and gradients of x pass within +-a (of P from 0 to
    a); those of W pass everywhere. sign(0) is 1. ``linears=True`` adds ``x A^T B^T`` of that rank
    to queries, keys and values. Tables that are targeted have their entries in signs.

    Start: not the pre-trained function. a is twice the mean size of what it scales, as calibration
    data show it in the base; of P `peak` times: where no probability is above half of a, nothing is
    attended to and values learn nothing. Estimates are N(0, 0.02), biases 0 (published), or with
    ``init="zero"`` p, r and B are zero. Trains a per linear, 4 + 4 (d rank + rank) + d + 1 per
    attention (25,377 + 4 at d = 768, rank 8), with `linears` 2 d rank for q, k and v each, and the
    latent weights of what stands beside it, as published by masked words first: ``full + bipft``;
    it saves nothing there. Kept for backward: two bits of each input; q, k, v and x of attention.
    No merge: a plain module does not read signs. The head stays as it is. A cache is refused.

    Departures: a starts as the base shows it, not the first batch behind binary layers; no trained
    shift of x. Best readings: behind rotary positions m and p are of x alone, a fused projection's
    branch is one.
    """

    paper: ClassVar[str] = ("BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estima"
                            "tion of Binarization Residual Polynomials (2023), arXiv:2312.08937")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding"})
    needs: ClassVar[frozenset[str]] = frozenset({"open attention"})
    shown_beside: ClassVar[str] = "lora(rank=4)"
    small: ClassVar[dict[str, Any]] = {"peak": 1.5}      # attentions of random weights are flat
    excused: ClassVar[dict[str, str]] = {"every_tensor_has_a_gradient": "by chance: a of P beyond "
                                         "twice each probability; tests/methods/test_bipft.py"}

    rank: int = setting(1, "numbers a token that an estimate of queries or keys has")
    linears: bool = setting(False, "low-rank branches beside q, k and v")
    init: Literal["bert", "zero"] = setting("bert", "start of the estimates")
    peak: float = setting(4.0, "a of probabilities at the start, over their mean", other=(2.5,))

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.peak > 0:
            raise RecipeError("bipft: a rank of at least 1 and a peak above 0 are expected, got "
                              f"{self.rank} and {self.peak:g}")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",
                "how attention is computed")

    def observe(self, place: Place) -> MeanSize | None:
        return None if place.role == "head" or place.kind == "embedding" else MeanSize()

    def delta(self, site: Site) -> Centred | None:
        if (place := site.place).role == "head" or place.kind == "embedding":
            return None if place.role == "head" else Centred(0)
        start = 1.0 if site.seen is None else SIGNED * site.seen.value
        return Elastic(place.out, place.inp, start, self.branched(place), self.init == "zero")

    def branch(self, anatomy: Anatomy) -> Iterable[Attentions]:
        paths = open_attentions(anatomy, self.name)
        widths = {b.attn: b.hidden_size or anatomy.hidden_size or 0
                  for b in anatomy.blocks if b.attn in paths}
        if self.rank > (least := min(widths.values())):
            raise RecipeError(f"bipft: rank={self.rank}: expected at most {least}, the width read")
        yield Attentions(self, widths)

    def branched(self, place: Place) -> int:
        return self.rank if self.linears and place.role in ("q", "k", "v", "qkv") else 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        table = place.kind == "embedding"
        return 0 if table else 1 + self.branched(place) * (place.inp + place.out)

    def estimates(self, d: int) -> int:
        """Of one attention that reads width d."""
        return 4 + 4 * (d * self.rank + self.rank) + d + 1


@dataclass(frozen=True)
class Attentions:
    """Attentions on bits, by path, with the width that each reads."""

    method: Bipft
    widths: dict[Any, Any]

    def install(self, attacher: Any, part: Method) -> None:
        m, sizes = self.method, Sizes(self.widths)
        with sizes.seen(attacher.model):
            attacher.rehearse(part)
        for path, width in self.widths.items():
            made = Estimated(attacher.state, attacher.adapter.name, width, m.rank, m.init == "zero")
            if (known := sizes.of(path)) is not None:
                made.begin(known, m.peak)
            made.to(attacher.device(path)).listen(attacher.slot(path), part.name)
