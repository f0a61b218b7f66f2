from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from ...blocks.state.ghosts import Ghosts, batch_norms
from ...blocks.update.groups import Times
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher

OTHER = ("in training it normalises other batches than the model: "
         "tests/methods/test_ghost_batch_norm.py")


@dataclass(frozen=True, kw_only=True)
class GhostBatchNorm(Method):
    """Ghost batch norm: a large batch is normalised in small runs, and its learning rate grows.

        y_g = gamma (x_g - mean(x_g)) / sqrt(var(x_g) + eps) + beta      for each B_S samples g
        lr_L = sqrt(B_L / B_S) lr_S

    Running statistics take one step for each run, in order, a short last one by its share. Scale
    and shift are shared. `united` is B_L, the samples of an update, and multiplies the learning
    rate; 0 leaves it. Regime adaptation is the caller's: as many updates as with small batches
    (B_L / B_S times the epochs), drops of the rate at the same updates, and clipping.

    Start: in evaluation the function as it is, and so after a merge: there it does nothing. A batch
    norm that is in evaluation mode while the others train (a frozen backbone) is left alone, and
    batches of B_S samples or fewer are as they were. Trains nothing, keeps nothing besides. Micro-
    batches of an accumulation are runs by themselves already.
    """

    paper: ClassVar[str] = ("Train longer, generalize better: closing the generalization gap in "
                            "large batch training of neural networks, NeurIPS 2017")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"batch norms"})
    small: ClassVar[dict[str, int]] = {"ghost": 1}
    excused: ClassVar[dict[str, str]] = {
        "equals_the_untouched_model": OTHER, "equals_the_untouched_model_under_dropout": OTHER}

    ghost: int = setting(128, "B_S, samples normalised together", other=(2,))
    united: int = setting(0, "B_L, samples of an update, for the learning rate; 0: as it is",
                         other=(16,))

    def __post_init__(self) -> None:
        if self.ghost < 1 or self.united and self.united < self.ghost:
            raise RecipeError(f"ghost_batch_norm: ghost={self.ghost}, united={self.united}: "
                              "expected at least 1, and a large batch of no fewer, or 0")

    def claims(self) -> tuple[str, ...]:
        return ("how batches are normalised",)

    def activations(self, anatomy: Anatomy) -> Runs:
        return Runs(self.ghost)

    def optimizer(self) -> Times | None:
        return Times(rate=sqrt(self.united / self.ghost), name=self.name) if self.united else None


@dataclass(frozen=True)
class Runs:
    """Every batch norm looks at so many samples at a time."""

    batch: int

    def install(self, attacher: Attacher, part: Method) -> None:
        paths = batch_norms(attacher.model)
        if not paths:
            refuse(part, attacher.anatomy)
        for path in paths:
            Ghosts(attacher.state, attacher.adapter.name, self.batch).listen(
                attacher.slot(path), part.name)
