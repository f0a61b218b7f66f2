from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ....blocks.update.noise import CounterNoise
from ....blocks.update.objective import OnWeights
from ....blocks.weight.concrete import Concrete, Grouped, largest
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....core.protocols import Pass
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """Diff pruning: a difference that learns where it is zero, then keeps its few largest entries.

    ``W' = W + z * w``, ``z = clip(3 s - 1.5, 0, 1)``, ``s = sigmoid(log u - log(1 - u) + a)``; w
    and a (out, in), u uniform on (0, 1), drawn anew in every pass of a step; elsewhere (evaluation,
    merge) u = 1/2. Loss ``+ weight sum sigmoid(a)``, the expected number of entries that are not
    zero. With `structured` a matrix has one more gate: ``z z_g * w``, and
    ``sum sigmoid(a) sigmoid(a_g)``.

    After `search` of the run the k = density x (entries of all targets) largest |z w| over all
    matrices stay, at z w; gates are gone, and those k train on with a fresh optimizer state. A
    matrix that has none costs nothing any more. Without the number of updates all stay.

    Start: w = 0, a = init: the pre-trained function exactly. Trains 2 out in per matrix and as much
    state, more than full fine-tuning; then k in all. Kept for backward: x; u is drawn again there,
    panel by panel. Merges exactly. The file of a finished run has index and value, 8 bytes an
    entry. Vectors (biases, norms) are no candidates: set bitfit beside it; the head is exempt.

    Our reading (unconfirmed): init, weight, gate_rate and search; z at u = 1/2 in the projection;
    the values that stay start from z w.
    """

    paper: ClassVar[str] = ("Parameter-Efficient Transfer Learning with Diff Pruning, ACL 2021, "
                            "arXiv:2012.07463")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "resize")
    #: gates of 5 are wide open in every draw of a small run
    small: ClassVar[dict[str, float]] = {"init": 0.3, "density": 0.1}

    density: float = setting(0.005, "share of the entries that train in the end")
    search: float = setting(0.5, "share of the run after which they are chosen")
    weight: float = setting(1.25e-7, "of the expected number of entries", alias=("sparsity_pen",))
    init: float = setting(5.0, "a at the start", alias=("alpha_init",), signed=True)
    gate_rate: float = setting(10.0, "learning rate of gates over that of w")
    structured: bool = setting(False, "one more gate for each matrix")
    seed: int = setting(0, "of the gates' draws")

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or not 0 < self.search < 1:
            raise RecipeError("diff_pruning: density and search are shares above 0 and below 1, "
                              f"got {self.density} and {self.search}")
        if self.weight <= 0 or self.gate_rate <= 0:
            raise RecipeError("diff_pruning: weight and gate_rate are positive, got "
                              f"{self.weight} and {self.gate_rate}")

    def delta(self, site: Site) -> Concrete:
        noise = CounterNoise(self.seed, f"diff_pruning/{site.place.name}")
        kind = Grouped if self.structured else Concrete
        term = kind(site.place, self.init, noise, site.settled.get("entries"), site.weight.device)
        for p in term.gates():
            p.burnish_lr = self.gate_rate                # type: ignore[attr-defined]
            p.burnish_decay = False                      # type: ignore[attr-defined]
        return term

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        for _, term in tuned.terms(Concrete):
            yield OnWeights(term.gates(), partial(self.penalty, term),
                            partial(term.pull_expected, self.weight))

    def penalty(self, term: Concrete) -> Tensor:
        """The term of the loss."""
        return self.weight * term.expected()

    def controller(self, tuned: Tuned) -> Stages:
        return Stages(self, tuned)

    def per_token(self, place: Place) -> int:
        """Numbers kept per token besides the input."""
        return 0

    def count(self, place: Place, entries: int | None = None) -> int:
        """Trainable parameters on one matrix; entries: once they are chosen."""
        return 2 * place.numel + self.structured if entries is None else entries


class Stages:
    """Gates that are drawn around each pass, and the projection."""

    def __init__(self, method: DiffPruning, tuned: Tuned):
        self.method, self.resize = method, tuned.resize
        self.terms = [t for _, t in tuned.terms(Concrete)]
        self.total: int | None = None
        self.passes = 0                                  # drawn so far

    def start(self, total: int | None) -> None:
        self.total = total

    def step_begin(self, step: int) -> None:
        self.rest()

    def rest(self) -> None:
        """What is empty trains no more."""
        for p in (p for t in self.terms for p in t.theta() if not p.numel()):
            p.requires_grad_(False)

    def around_step(self, step: Pass) -> Iterator[None]:
        self.draw(self.passes)
        self.passes += 1
        try:
            yield
        finally:
            self.draw(None)

    def draw(self, turn: int | None) -> None:
        for term in self.terms:
            term.turn = turn

    def after_update(self, step: int) -> None:
        if self.total is not None and step + 1 >= self.end(self.total) \
                and not all(t.decided for t in self.terms):
            self.project()

    def end(self, total: int) -> int:
        """Updates with gates: one at least, and one at least is left where there are two."""
        return max(1, min(round(self.method.search * total), total - 1))

    def project(self) -> None:
        if any(isinstance(t.gate, FakeTensor) for t in self.terms):
            return                                       # no values: the dearest is that all stay
        k = max(1, round(self.method.density * sum(t.values.numel() for t in self.terms)))
        for term, (index, values) in zip(self.terms, largest(self.terms, k), strict=True):
            term.project(index, values, self.resize)

    def state_dict(self) -> Mapping[str, Any]:
        return {"total": self.total, "passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.passes = state["total"], state["passes"]
        self.rest()
