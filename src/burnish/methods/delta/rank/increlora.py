from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ....blocks.choose.score import Smoothed
from ....blocks.update.noise import fold
from ....blocks.update.objective import OnWeights
from ....blocks.weight.triplets import Triplets, crooked
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned

#: what stands for E in the components that wait
WAITING = 1e-5


class Growing(Triplets):
    """``Delta = s P diag(E, 1e-5 ...) Q``, s = alpha / (rank + 1e-5): the last components of P and
    Q wait, trained but all but without effect, until their E is set free."""

    def __init__(self, place: Place, rank: int, waiting: int, alpha: float):
        super().__init__(place, rank + waiting, 1.0)
        self.E = torch.nn.Parameter(torch.zeros(rank))
        self.alpha = alpha
        self.scoring = False
        self.score: Tensor | float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / (self.E.numel() + 1e-5)

    @scale.setter
    def scale(self, value: float) -> None:
        """It follows from the rank."""

    @property
    def waiting(self) -> int:
        return self.P.shape[1] - self.E.numel()

    def diagonal(self) -> Tensor:
        return torch.cat([self.E, self.E.new_full((self.waiting,), WAITING)])

    def settled(self) -> dict[str, Any]:
        return {"rank": self.E.numel(), "waiting": self.waiting}

    def backward_(self, g_NO: Tensor, x_NI: Tensor, kept: Any, dx_NI: Tensor | None,
                  scale: float) -> list[Tensor | None]:
        if self.scoring:                               # sum |Delta * G|, a run of inputs at a time
            step = max(1, (1 << 22) // g_NO.shape[1])
            for i in range(0, x_NI.shape[1], step):
                j = min(i + step, x_NI.shape[1])
                self._score(i, j, g_NO.t() @ x_NI[:, i:j])
        return super().backward_(g_NO, x_NI, kept, dx_NI, scale)

    def pull(self, i0: int, i1: int, G: Tensor, state: Any,
             grads: list[Tensor | None]) -> Tensor:
        if self.scoring:
            self._score(i0, i1, G)
        return super().pull(i0, i1, G, state, grads)

    @torch.no_grad()
    def _score(self, i0: int, i1: int, G: Tensor) -> None:
        self.score = self.score + (self.tile(i0, i1, None) * G.to(self.P.dtype)).abs().sum()


#: with these a small model grows within a few updates
_GROWS = {"warmup": 1, "every": 1, "top": 2, "rank": 6, "init_rank": 1}


@dataclass(frozen=True, kw_only=True)
class Increlora(Method):
    """IncreLoRA: every update starts at rank one; the matrices that matter grow.

    ``Delta = s P diag(E) Q``, s = alpha / (r + 1e-5) with r the present rank; P (out, r), E (r,),
    Q (r, in). Score of a matrix per update: ``S = sum |Delta * dL/dDelta| / sqrt(out in)``,
    smoothed to ``I' U`` as in AdaLoRA. After `warmup` updates, every `every` updates, the `top`
    matrices of the highest score gain `grow` components, until the ranks sum to rank x matrices.
    Advance learning: each matrix carries `grow` further components of P and Q that train with E
    held at 1e-5; growth sets their E free and brings new ones; at the end those that wait go.
    ``advance=False``: new components come with E = 0 instead. Objective: ``ortho * mean
    ||P^T P - I||_F`` over all P and Q.

    s falls as r grows, so growing shrinks the update by r / (r + grow), as the authors' code does;
    ``preserve=True`` raises E by the inverse, and growing changes nothing.

    Start: P, Q normal with std 0.02, E = 0; the function is the pre-trained one up to
    1e-5 alpha |p| |q| (exactly with ``advance=False``). Trains (r + waiting)(in + out) + r per
    matrix. Kept for backward: x and r + waiting numbers per token. Scoring forms g^T x a run of
    columns at a time: as many operations as a full gradient, nothing of its size; it ends with
    the growth. Merges exactly. No weight decay. (A restart of the learning rate for new
    components is unconfirmed in the paper's code, and not built.)
    """

    paper: ClassVar[str] = ("IncreLoRA: Incremental Parameter Allocation Method for "
                            "Parameter-Efficient Fine-tuning (2023), arXiv:2308.12043")
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("gradient", "resize")
    small: ClassVar[dict[str, int]] = {"init_rank": 2}

    rank: int = setting(8, "rank per matrix on average at the end", alias=("target_r", "r"))
    init_rank: int = setting(1, "rank per matrix at the start", alias=("init_r",))
    grow: int = setting(1, "components a matrix gains at a time", beside=_GROWS)
    top: int = setting(18, "matrices that grow at a time", beside=_GROWS)
    warmup: int = setting(1000, "updates before the first growth", beside=_GROWS)
    every: int = setting(1000, "updates between two growths", beside=_GROWS)
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    ortho: float = setting(0.1, "weight of the orthogonality term", alias=("orth_reg_weight",))
    advance: bool = setting(True, "train components before they count", beside=_GROWS)
    preserve: bool = setting(False, "growing leaves the function as it was",
                             beside=_GROWS)

    def __post_init__(self) -> None:
        if not 1 <= self.init_rank <= self.rank:
            raise RecipeError(f"increlora: init_rank {self.init_rank} must be between 1 and rank "
                              f"{self.rank}")
        if min(self.grow, self.top, self.every) < 1 or self.warmup < 0:
            raise RecipeError("increlora: grow, top, every >= 1 and warmup >= 0 are expected")

    def claims(self) -> tuple[str, ...]:
        return ("the budget of triplets",)

    def delta(self, site: Site) -> Growing:
        site.place.check_rank(self.init_rank, "increlora")
        term = Growing(site.place, site.settled.get("rank", self.init_rank),
                       site.settled.get("waiting", self.grow if self.advance else 0), self.alpha)
        for p in term.parameters():
            p.burnish_decay = False
        return term

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        yield from crooked([t for _, t in tuned.terms(Growing)], self.ortho)

    def controller(self, tuned: Tuned) -> Grower:
        return Grower(self, dict(tuned.terms(Growing)), tuned.resize)

    def count(self, place: Place, rank: int | None = None, waiting: int | None = None) -> int:
        """Trainable parameters on one matrix of this rank (default: at the start)."""
        r = self.init_rank if rank is None else rank
        w = (self.grow if self.advance else 0) if waiting is None else waiting
        return (r + w) * (place.out + place.inp) + r


class Grower:
    """Scores, and who grows when."""

    def __init__(self, method: Increlora, terms: dict[str, Growing], resize: Any):
        self.method, self.terms, self.resize = method, terms, resize
        self.scores = {n: Smoothed() for n in terms}
        self._listen()

    @property
    def left(self) -> int:
        """Components still to be given."""
        return self.method.rank * len(self.terms) - sum(t.E.numel() for t in self.terms.values())

    def _listen(self) -> None:
        for term in self.terms.values():
            term.scoring, term.score = self.left > 0, 0.0

    def after_update(self, step: int) -> None:
        if self.left <= 0:
            return
        for name, term in self.terms.items():
            S = term.score / (term.P.shape[0] * term.Q.shape[1]) ** 0.5
            self.scores[name].update(torch.as_tensor(S).reshape(1).float())
            term.score = 0.0
        done = step + 1
        if done >= self.method.warmup and (done - self.method.warmup) % self.method.every == 0:
            self._grow(step)

    @torch.no_grad()
    def _grow(self, step: int) -> None:
        ranked = sorted(self.terms, key=lambda n: -float(self.scores[n].score()))
        able = [n for n in ranked if self.terms[n].E.numel() < min(
            self.terms[n].P.shape[0], self.terms[n].Q.shape[1])]
        for name in able[: self.method.top]:
            if (n := min(self.method.grow, self.left)) > 0:
                self._gain(name, n, step)
        if self.left <= 0:
            for term in self.terms.values():
                if term.waiting:
                    stay = torch.arange(term.E.numel())
                    self.resize(term, keep={"P": stay, "Q": stay})
            self._listen()

    def _gain(self, name: str, n: int, step: int) -> None:
        term, r = self.terms[name], self.terms[name].E.numel()
        g = torch.Generator().manual_seed(fold("increlora", name, step) % 2**63)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g) * 0.02

        free = term.E.new_full((n,), WAITING if term.waiting else 0.0)
        self.resize(term, fresh={"E": free, "P": drawn(term.P.shape[0], n),
                                 "Q": drawn(n, term.Q.shape[1])})
        if self.method.preserve:
            term.E.mul_((r + n) / r)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": {n: s.state() for n, s in self.scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for n, s in self.scores.items():
            s.load(state["scores"][n])
        self._listen()
