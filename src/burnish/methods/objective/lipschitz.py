from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks.update.objective import OnWeights
from ...blocks.update.spectral_ball import chain, clip_, excess, norm_of_chain
from ...blocks.weight.factor import Chain
from ...blocks.weight.provided import Term
from ...core.errors import RecipeError
from ...core.events import LATE
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Lipschitz(Method):
    """Lipschitz-bounded updates: no layer carries two inputs further apart than the base's by more
    than a bound.

        D <- U min(S, bound) V^T        after every update       (mode="project")
        loss + weight sum_D max(||D||_2 - bound, 0)^2            (mode="penalty")

    D = U S V^T what is added to a matrix: ``s B A`` of `lora` and its like, ``W - W0`` of weights
    that train whole. Then ``||W + D||_2 <= ||W||_2 + bound`` matrix by matrix, and what is learnt
    stays bounded for inputs that are changed a little. The projection is onto the nearest matrix in
    the ball, written to B (or to W); moments stay as they are. The penalty leaves what is within
    the bound alone.

    Beside ``lora(rank=8)`` or ``full``: for models that are to stay steady (noise, shifts, attacks
    on the input). Not for a run that does not get near the bound: look at ``||D||_2`` first.
    Norms, biases and the head are left free; experts are bounded one by one; a kernel of a
    convolution as the matrix (out, in k k), which bounds what it does to one patch. Refused beside
    other updates than chains (`loha`, functions of W), as nothing here would bound them.

    Trains nothing of its own; a QR of both factors and an SVD of (rank, rank) a matrix and update,
    of whole weights an SVD of W's size. Start: D = 0, within any bound. The bound is on D, not on
    the whole model: that is the product over layers. Departure: clipped to the nearest matrix, the
    papers scale it down or bound its rows' sums.
    """

    paper: ClassVar[str] = ("Regularisation of Neural Networks by Enforcing Lipschitz Continuity "
                            "(2018), arXiv:1804.04368; Distance-Based Regularisation of Deep "
                            "Networks for Fine-Tuning, ICLR 2021, arXiv:2002.08253")
    small: ClassVar[dict[str, float]] = {"bound": 1e-4}

    bound: float = setting(1.0, "largest ||D||_2 of a matrix", other=(1e-3,))
    mode: Literal["project", "penalty"] = setting("project", "after each update, or in the loss",
                                                  beside={"weight": 1e3})
    weight: float = setting(1.0, "of the penalty", beside={"mode": "penalty"}, other=(1e4,))

    def __post_init__(self) -> None:
        if not 0 < self.bound < float("inf") or not 0 < self.weight < float("inf"):
            raise RecipeError("lipschitz: bound and weight above 0 are expected, got "
                              f"{self.bound:g} and {self.weight:g}")

    def claims(self) -> tuple[str, ...]:
        return ("the norm of the updates",)

    def controller(self, tuned: Tuned) -> Ball:
        return Ball(self, tuned)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        if self.mode == "project":
            return
        for term in chains(tuned):
            yield OnWeights(tuple(t for t in term.theta() if t.requires_grad),
                            partial(self._chain, term))
        for p, key in whole(tuned):
            yield OnWeights((p,), partial(self._whole, tuned, p, key))

    def _chain(self, term: Chain) -> Tensor:
        A, B = term.factors()
        return self.weight * excess(norm_of_chain(B, A), self.bound)

    def _whole(self, tuned: Tuned, p: nn.Parameter, key: tuple[str, str]) -> Tensor:
        D = away(tuned, p, key)
        with torch.no_grad():
            U, _, Vt = torch.linalg.svd(D.detach(), full_matrices=False)
        return self.weight * excess(U[:, 0] @ D @ Vt[0], self.bound)


class Ball:
    """Projects after every update, behind whatever else changes what trains."""

    phase: ClassVar[int] = LATE

    def __init__(self, method: Lipschitz, tuned: Tuned):
        self.method, self.tuned = method, tuned
        if not chains(self.tuned) and not whole(self.tuned):
            raise RecipeError(f"lipschitz: nothing that {self.tuned.recipe} trains is a matrix "
                              "with a norm to bound: beside lora(rank=8) or full")

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        if self.method.mode != "project":
            return
        for term in chains(self.tuned):
            A, B = term.factors()
            U, S, _ = chain(B, A)
            clip_(term.B, U, S, self.method.bound)
        for p, key in whole(self.tuned):
            D = away(self.tuned, p, key)
            U, S, _ = torch.linalg.svd(D, full_matrices=False)
            was = D.clone()
            clip_(D, U, S, self.method.bound)
            p.add_((D - was).view(p.shape).to(p.dtype))


def chains(tuned: Tuned) -> list[Chain]:
    """The updates that are chains of two factors. RecipeError for one that is none."""
    found = []
    for place, term in tuned.terms(Term):
        if not any(t.requires_grad for t in term.theta()):
            continue
        if not isinstance(term, Chain) or type(term).factors is not Chain.factors \
                or type(term).dense is not Chain.dense:
            raise RecipeError(f"lipschitz bounds the updates B A of lora and its like, and whole "
                              f"weights; at {place} stands {type(term).__name__}")
        found.append(term)
    return found


def whole(tuned: Tuned) -> list[tuple[nn.Parameter, tuple[str, str]]]:
    """Matrices of the base that train, outside its head, and where their start waits."""
    found = []
    for name, p in tuned.named_parameters():
        path, _, leaf = name.rpartition(".")
        headed = any(path == h or path.startswith(f"{h}.") for h in tuned.anatomy.head)
        if ".burnish." not in f".{name}" and p.dim() > 1 and not headed \
                and (path, leaf) in tuned.originals.about:
            found.append((p, (path, leaf)))
    return found


def away(tuned: Tuned, p: Tensor, key: tuple[str, str]) -> Tensor:
    """``W - W0`` (out, rest), in fp32 at least."""
    W0: Any = tuned.originals.get(*key)
    wide = torch.promote_types(p.dtype, torch.float32)
    return (p.to(wide) - W0.to(p.device)).flatten(1)
