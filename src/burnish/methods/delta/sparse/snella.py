from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ....blocks.choose.ranks import Falling
from ....blocks.choose.score import magnitude, sensitivity
from ....blocks.choose.shares import Sharing
from ....blocks.weight.tiled import KernelDelta
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .snell import check_drops, check_kernel, dropped

if TYPE_CHECKING:
    from ....engine.tuned import Tuned

IMPORTANCE = {"ipt": sensitivity, "mag": magnitude}


@dataclass(frozen=True, kw_only=True)
class Snella(Method):
    """SNELLA: SNELL with a mixed kernel, and a budget that moves between layers while training.

    Per matrix, with A (2, in, q), B (2, out, q), q = rank // 2 and scalars alpha, gamma, beta::

        D = 0.1 (d_1 - d_2),  d_h[o, i] = ||B_h[o] - A_h[i]||_2
        K = D + alpha softmax_o(D / gamma) + beta
        Delta = K |K| 1[|K| > tau_l],  tau_l = the s_l-quantile of |K|

    the factor |K| 1[...] constant in the gradient, as in SNELL. Budget, in entries of Delta over
    all matrices: V(t) falls cubically from (1 - s) to (1 - s_target) of them between `warmup` and
    1 - `cooldown` of training, reallocated `rounds` times, after k / (rounds + 1) of training for
    k = 1 ... rounds, so that every share is trained and the last is the target: v_l in proportion
    to the layer's importance ``e_l = mean(I' U)_A + mean(I' U)_B``, capped at the layer's size;
    s_l = 1 - v_l / (in out). I is smoothed by 0.85: |theta dtheta| with the new theta and the old
    gradient (`metric` "ipt"), or |theta| ("mag"; the authors' third, w_mag, does not run).

    With s = s_target = 0 nothing competes: Delta = K, dense and unsquared (the authors' mixk), and
    what a budget would read is refused. `magnitude` "linear" is Delta = K 1[|K| > tau_l] with a
    budget as well; "auto" is what the authors run. `dropout` and `drop_path` are SNELL's.

    Start: alpha = gamma = 1, beta = 0, factors as SNELL: near, not equal to, the pre-trained
    function (mixk: Delta about 1 / out everywhere). Trains rank (in + out) + 3 per matrix; factors
    decay, the three scalars do not (unconfirmed). Kept for backward: x and tau, and with
    Triton's kernels two floats per input feature; scores hold two floats per factor element. Merges
    exactly in fp32. Saved: factors, scalars and every s_l.

    Where the number of steps is unknown (a bare loop), the budget stays at `s` unless
    ``tuned.total_steps`` is set. The authors count `rounds` in epochs (100).
    """

    paper: ClassVar[str] = ("Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for "
                            "Vision Models (2025)")
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "its_dropout_is_differentiated":
            "one factor of the update is a constant of the gradient by definition, so it is no "
            "derivative of the loss; tests/blocks/test_dropped.py holds the reference under the "
            "same masks"}
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "width of both factors together; even (the authors use 32)",
                        alias=("r",))
    s: float = setting(0.01, "share of zeros at the start", alias=("s_init",))
    s_target: float = setting(0.5, "share of zeros at the end")
    metric: Literal["ipt", "mag"] = setting("ipt", "importance: |theta dtheta| or |theta|")
    magnitude: Literal["auto", "signed_square", "linear"] = setting(
        "auto", "Delta from K: auto is linear where nothing competes, else signed_square",
        other=("linear",))
    rounds: int = setting(100, "how often the budget is reallocated in a run", other=(2,))
    warmup: float = setting(0.0, "share of training before the budget starts to fall")
    cooldown: float = setting(0.0, "share of training after it has arrived")
    dropout: float = setting(0.0, "dropout on the input of the update (the authors: 0.1)")
    drop_path: float = setting(0.0, "drops the whole update of a sample (the authors: 0.1)")

    def __post_init__(self) -> None:
        check_kernel("snella", self.rank, self.s, self.s_target)
        check_drops("snella", self.dropout, self.drop_path)
        if self.rounds < 1 or self.warmup < 0 or self.cooldown < 0 \
                or self.warmup + self.cooldown >= 1:
            raise RecipeError("snella: rounds >= 1 and warmup + cooldown < 1 are expected")
        if idle := self.dense and [k for k in ("metric", "rounds", "warmup", "cooldown")
                                   if k in self.changed()]:
            raise RecipeError(f"snella: at s = s_target = 0 every entry lives, so {idle[0]} has "
                              "nothing to act on; leave it out, or give a share of zeros")

    @property
    def dense(self) -> bool:
        """Does nothing compete?"""
        return self.s == self.s_target == 0

    @property
    def relies_on(self) -> tuple[str, ...]:              # type: ignore[override]
        return () if self.dense else ("gradient",)

    def claims(self) -> tuple[str, ...]:
        return () if self.dense else ("the budget of generated entries",)

    def delta(self, site: Site) -> KernelDelta:
        form = self.magnitude
        if form == "auto":
            form = "linear" if self.dense else "signed_square"
        term = KernelDelta(site.place, self.rank, self.s, mixed=True,
                           magnitude=form, dropout=dropped(site.place, self.dropout),
                           drop_path=self.drop_path)
        for p in (term.alpha, term.gamma, term.beta):
            p.burnish_decay = False
        term.budgeted = not self.dense
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp) + 3

    def controller(self, tuned: Tuned) -> Sharing | None:
        if self.dense:
            return None
        return Sharing({n: t for n, t in tuned.terms(KernelDelta) if t.budgeted},
                       Falling(1 - self.s, 1 - self.s_target, self.warmup, self.cooldown),
                       self.rounds, IMPORTANCE[self.metric])
