from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....blocks.weight.tiled import KernelDelta
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Snell(Method):
    """SNELL: a sparse update generated from two thin factors by a distance kernel.

    With q = rank // 2, A (2, in, q), B (2, out, q) and ``d_h[o, i] = ||B_h[o] - A_h[i]||_p``::

        K = 0.1 (d_1 - d_2)            tau = the s-quantile of |K| over the matrix
        Delta = K |K| 1[|K| > tau]     y = W x + b + path(Delta drop(x))

    The factor |K| 1[...] is constant in the gradient (so dK = |K| dDelta on survivors, zero
    elsewhere) and nothing flows into tau. The matrix K has full rank although the factors are
    thin. tau is recomputed in every forward; indices are never stored.

    Start: A uniform in +-1/sqrt(in q), B in +-1/sqrt(out q): close to, not equal to, the
    pre-trained function (rms of Delta about 3e-6 at 768 x 768, rank 8). Trains rank (in + out) per
    matrix (rank even); the class token, which the authors train too, is ``+
    full(targets="cls_token")``. Kept for backward: x, once for all layers that read it, and tau.
    Panels of Delta are made in forward and again in backward; the published code keeps checkpoints
    and sorts instead. Merges exactly in fp32.

    drop: `dropout` on the input of the update, one mask for layers that read one tensor (q, k, v),
    none at the attention's output projection. path: `drop_path` leaves the update out of whole
    samples, drawn for each matrix. The authors take 0.1 of both. At 0, the default, panels are
    added to W before one product; else base and update are two, and masks are drawn again in
    backward, never kept. Refused on convolutions and torch's attention, which take a weight.

    `magnitude` "linear" is Delta = K 1[|K| > tau]. "auto" is what the authors run: at s = 0 their
    dense class (KLoRA), Delta = K unsquared, and the signed square above; so s = 0 and a tiny s
    differ in scale.
    """

    paper: ClassVar[str] = "Expanding Sparse Tuning for Low Memory Usage (2024), arXiv:2411.01800"
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "its_dropout_is_differentiated":
            "one factor of the update is a constant of the gradient by definition, so it is no "
            "derivative of the loss; tests/blocks/test_dropped.py holds the reference under the "
            "same masks"}
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "width of both factors together; even", alias=("r",))
    s: float = setting(0.5, "share of entries that stay zero, in [0, 1)", alias=("sparsity",))
    norm_p: float = setting(2.0, "p of the distance")
    magnitude: Literal["auto", "signed_square", "linear"] = setting(
        "auto", "Delta from K: auto is linear where nothing competes, else signed_square",
        other=("linear",))
    dropout: float = setting(0.0, "dropout on the input of the update (the authors: 0.1)")
    drop_path: float = setting(0.0, "drops the whole update of a sample (the authors: 0.1)")

    def __post_init__(self) -> None:
        check_kernel("snell", self.rank, self.s)
        check_drops("snell", self.dropout, self.drop_path)
        if self.norm_p < 1:
            raise RecipeError(f"snell: norm_p is the p of a norm, at least 1, got {self.norm_p}")

    def delta(self, site: Site) -> KernelDelta:
        form = self.magnitude
        if form == "auto":
            form = "signed_square" if self.s else "linear"
        return KernelDelta(site.place, self.rank, self.s, mixed=False, norm_p=self.norm_p,
                           magnitude=form, dropout=dropped(site.place, self.dropout),
                           drop_path=self.drop_path)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)


def dropped(place: Place, p: float) -> float:
    """Dropout on the input of the update of one matrix."""
    return 0.0 if place.role == "o" else p


def check_drops(name: str, dropout: float, drop_path: float) -> None:
    """Probabilities below one."""
    for word, p in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0 <= p < 1:
            raise RecipeError(f"{name}: {word} is a probability in [0, 1), got {p}")


def check_kernel(name: str, rank: int, *shares: float) -> None:
    """Even rank, shares in [0, 1)."""
    if rank < 2 or rank % 2:
        raise RecipeError(f"{name}: rank {rank} must be even and at least 2 (two heads share it); "
                          f"try rank={max(2, rank + rank % 2)}")
    for s in shares:
        if not 0 <= s < 1:
            raise RecipeError(f"{name}: a share of zeros is in [0, 1), got {s}")
