from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ....blocks.choose.budget import allocate, cubic
from ....blocks.choose.score import Smoothed, sensitivity
from ....blocks.weight.tiled import KernelDelta
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .snell import check_kernel

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


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
    to the layer's importance ``e_l = mean(I' U)_A + mean(I' U)_B`` (I = |theta dtheta| with the
    new theta and the old gradient, smoothed by 0.85), capped at the layer's size;
    s_l = 1 - v_l / (in out).

    Start: alpha = gamma = 1, beta = 0, factors as SNELL: near, not equal to, the pre-trained
    function. Trains rank (in + out) + 3 per matrix. Kept for backward: x and tau; scores hold two
    floats per factor element. Merges exactly in fp32. Saved: factors, scalars and every s_l.

    Where the number of steps is unknown (a bare loop), the budget stays at `s` unless
    ``tuned.total_steps`` is set. The authors count `rounds` in epochs (100).
    """

    paper: ClassVar[str] = ("Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for "
                            "Vision Models (2025)")
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("gradient",)

    rank: int = setting(8, "width of both factors together; even (the authors use 32)",
                        alias=("r",))
    s: float = setting(0.01, "share of zeros at the start", alias=("s_init",))
    s_target: float = setting(0.5, "share of zeros at the end")
    rounds: int = setting(100, "how often the budget is reallocated in a run", other=(2,))
    warmup: float = setting(0.0, "share of training before the budget starts to fall")
    cooldown: float = setting(0.0, "share of training after it has arrived")

    def __post_init__(self) -> None:
        check_kernel("snella", self.rank, self.s, self.s_target)
        if self.rounds < 1 or self.warmup < 0 or self.cooldown < 0 \
                or self.warmup + self.cooldown >= 1:
            raise RecipeError("snella: rounds >= 1 and warmup + cooldown < 1 are expected")

    def claims(self) -> tuple[str, ...]:
        return ("the budget of generated entries",)

    def delta(self, site: Site) -> KernelDelta:
        term = KernelDelta(site.place, self.rank, self.s, mixed=True)
        for p in (term.alpha, term.gamma, term.beta):
            p.burnish_decay = False
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp) + 3

    def controller(self, tuned: Tuned) -> Budget:
        return Budget(self, {n: t for n, t in tuned.terms(KernelDelta) if t.mixed})


class Budget:
    """The bi-level competition: scores every update, reallocates `rounds` times."""

    def __init__(self, method: Snella, terms: dict[str, KernelDelta]):
        self.method, self.terms = method, terms
        self.scores = {n: (Smoothed(), Smoothed()) for n in terms}
        self._score = {p: s for n, t in terms.items()
                       for p, s in zip((t.A, t.B), self.scores[n], strict=True)}
        self.total: int | None = None
        self.turns: frozenset[int] = frozenset()

    def start(self, total: int | None) -> None:
        self.total, rounds = total, self.method.rounds
        self.turns = frozenset(min(max(1, round(total * k / (rounds + 1))), max(1, total - 1))
                               for k in range(1, rounds + 1)) if total else frozenset()

    def budget(self, step: int) -> int:
        """V(t) in entries of Delta."""
        size = sum(t.out * t.inp for t in self.terms.values())
        m, last = self.method, max(self.turns)
        if step >= last:                             # there is no later turn to arrive at
            return round((1 - m.s_target) * size)
        return round(cubic((1 - m.s) * size, (1 - m.s_target) * size, step,
                           m.warmup * self.total, min((1 - m.cooldown) * self.total, last)))

    def tensor_updated(self, p: nn.Parameter, grad: Tensor) -> None:
        if (smoothed := self._score.get(p)) is not None:
            smoothed.update(sensitivity(p, grad))

    def after_update(self, step: int) -> None:
        done = step + 1
        if done in self.turns:
            self.reallocate(self.budget(done))

    def reallocate(self, budget: int) -> None:
        """Give every matrix its share of `budget` entries."""
        if any(a.mean is None for a, _ in self.scores.values()):
            return
        raw = torch.stack([a.score().mean() + b.score().mean()
                           for a, b in self.scores.values()])
        if _fake(raw):
            return
        sizes = [t.out * t.inp for t in self.terms.values()]
        for term, size, v in zip(self.terms.values(), sizes,
                                 allocate(budget, raw.tolist(), sizes), strict=True):
            term.sparsity = 1 - v / size

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total,
                "scores": {n: {"A": a.state(), "B": b.state()}
                           for n, (a, b) in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start(state["total"])
        for n, (a, b) in self.scores.items():
            a.load(state["scores"][n]["A"])
            b.load(state["scores"][n]["B"])


def _fake(t: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(t, FakeTensor)
