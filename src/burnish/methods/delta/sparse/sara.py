from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ....blocks.choose import masks
from ....blocks.linalg import polar
from ....blocks.update.noise import fold
from ....blocks.update.objective import OnWeights
from ....blocks.weight.rechosen import Rechosen, rechoose
from ....core.errors import RecipeError
from ....core.followed import is_fake
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned

#: a matrix is braked if both of its sides are longer, as in the authors' code
WIDE = 64


class Small(Rechosen):
    """A place's small entries. braked: is this the matrix whose rank is held down just now?"""

    braked: bool = False

    def masked(self, W: Tensor) -> Tensor:
        """``P * M``, (out, in): the entries that train, zero elsewhere."""
        v = self.weights(W)
        return v.new_zeros(self.out * self.inp).index_put_((self.trained,), v).view(self.out, -1)


@dataclass(frozen=True, kw_only=True)
class Sara(Method):
    """SaRA: the weights that are all but zero learn the new task; the others stay as they are.

    ``M = 1[|W0| < tau]``, ``W' = W0 + scatter(index of M, v)``,
    ``dv_k = sum_n g[n, o_k] x[n, i_k]``. Loss ``+ nuclear ||P * M||_*`` with P = W' on one matrix a
    step, drawn among those with both sides above 64 (kernels of convolutions, which are no
    matrices in the authors' code, are left out): the subgradient is ``U V^T`` at the entries of
    M. After `switch` updates the entries that have grown are held at what they have learned, and
    ``M <- M * 1[|W'| < tau]`` trains on with a fresh optimizer state.

    Start: v = 0, the pre-trained function exactly. Trains sum M; a matrix with no small entry is
    left alone. Kept for backward: x. The optimizer's state, the gradient and the file (index and
    value, 8 bytes an entry) are linear in sum M; the brake takes two matrices and one square
    of the short side while it acts. Merges exactly; what is not small stays to the bit. A promise
    made without values is of every entry. The authors take ``lr = 1e-3 exp(-350 tau)``.

    Departures: U V^T by Newton-Schulz instead of a decomposition at every step; vectors (biases,
    norms) are no candidates: set bitfit beside it; weight decay acts on v; no update is skipped at
    the switch. (The authors' optimizer writes absolute values back at its start and at the
    switch, so that small negative weights change their sign.)
    """

    paper: ClassVar[str] = ("SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive "
                            "Sparse Low-Rank Adaptation (2024)")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    by_data: ClassVar[bool] = True
    relies_on: ClassVar[tuple[str, ...]] = ("resize",)
    small: ClassVar[dict[str, float]] = {"tau": 0.01, "switch": 2}

    tau: float = setting(2e-3, "entries of W below it in size train", alias=("threshold",))
    switch: int = setting(2500, "updates after which entries are chosen again; 0: never",
                          alias=("progressive_iter",), other=(0,))
    nuclear: float = setting(5e-4, "weight of the nuclear norm",
                             unseen="no matrix of a small model is wide enough: "
                                    "tests/methods/test_sara.py")

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.switch < 0 or self.nuclear < 0:
            raise RecipeError("sara: tau is a positive size, switch and nuclear are not negative, "
                              f"got {self.tau}, {self.switch} and {self.nuclear}")

    def repeats(self) -> int | None:
        """One matrix of all is braked at a time."""
        return None

    def delta(self, site: Site) -> Small | None:
        place, known = site.place, site.settled.get("entries")
        if known is not None:
            return Small(place, masks.to_come(place, known), site.settled["live"])
        if is_fake(site.weight):
            return Small(place, masks.to_come(place, place.numel))
        W = site.weight.detach()
        wide = W.to(torch.promote_types(W.dtype, torch.float32))      # tau as it is, not rounded
        index = (wide.abs() < self.tau).flatten().nonzero().squeeze(1)
        return Small(place, index) if index.numel() else None

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        wide = self.wide(tuned) if self.nuclear else []
        if self.nuclear and not wide and "nuclear" in self.changed():
            raise RecipeError(f"sara: nuclear={self.nuclear} acts on matrices with both sides "
                              f"above {WIDE}, and no target is one; leave it out")
        for term in wide:
            yield brake(term, lambda term=term: tuned.weight(term.place), self.nuclear)

    def wide(self, tuned: Tuned) -> list[Small]:
        """The terms that can be braked."""
        return [t for _, t in tuned.terms(Small)
                if min(t.out, t.inp) > WIDE and t.place.kind != "conv"]

    def controller(self, tuned: Tuned) -> Phases:
        return Phases(self, tuned)

    def per_token(self, place: Place) -> int:
        """Numbers kept per token besides the input."""
        return 0

    def count(self, place: Place, live: int | None = None) -> int:
        """Trainable parameters on one matrix; without values: all there may be."""
        return place.numel if live is None else live


def brake(term: Small, base: Callable[[], Tensor], weight: float) -> OnWeights:
    """``weight ||P * M||_*`` while the term is braked, else nothing."""
    def value() -> Tensor:
        return weight * torch.linalg.matrix_norm(term.masked(base()), "nuc") * term.braked

    def grads() -> Sequence[Tensor | None]:
        if not term.braked:
            return [None]
        P = polar(term.masked(base())).flatten()[term.trained]
        return [P.to(term.values.dtype) * weight]

    return OnWeights((term.values,), value, grads)


class Phases:
    """Whose turn it is to be braked, and the choice between the phases."""

    def __init__(self, method: Sara, tuned: Tuned):
        self.method, self.tuned, self.at = method, tuned, 0
        self.wide = method.wide(tuned)

    def step_begin(self, step: int) -> None:
        if step and step == self.method.switch:
            for _, term in self.tuned.terms(Small):
                now = term.weights(self.tuned.weight(term.place)).abs()
                if not isinstance(now, FakeTensor):      # else their values: most is that all stay
                    rechoose(term, self.tuned.resize, now < self.method.tau, moments="drop")
        self.turn(step)

    def turn(self, step: int) -> None:
        """The same matrix on every rank, and after a resume."""
        self.at = step
        drawn = Random(fold("sara", step)).randrange(max(1, len(self.wide)))
        for k, term in enumerate(self.wide):
            term.braked = k == drawn

    def rehearse(self, step: int) -> None:
        dearest = max(self.wide, key=lambda t: t.out * t.inp, default=None)
        for term in self.wide:
            term.braked = term is dearest

    def state_dict(self) -> Mapping[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.turn(state["at"])
