from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.density import Dense
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher, Tuned


@dataclass(frozen=True, kw_only=True)
class Density(Method):
    """DEFT's density loss: what trains learns to leave the inner numbers of MLPs at zero.

        loss + weight sum_stacks mean_layers mean_x x^2 / (x^2 + eps)

    x what an MLP's last linear reads (behind the activation, and behind the gate where there is
    one), the mean over its numbers for tokens that are no padding; a stack is the model's, or
    encoder and decoder. It is a smooth share of numbers that are not zero, gradient ``2 eps x /
    (x^2 + eps)^2``. Where a number is zero for a token its column of that linear need not be read,
    which is what a sparse kernel saves later.

    Beside anything that trains (``pfeiffer + density``); trains nothing of its own. Start: answers
    are untouched, gradients are the task's and the term's from the first step. Of each layer x
    waits for backward, which the last linear may keep anyway, and which the lean tape makes again;
    in fp32 whatever the model is in. Works inside `checkpoint`. An MLP that nothing which trains
    reaches is left out. Experts have no last linear of their own and are left out.

    Named by what it is: `deft` is PEFT's. Left out: the tanh and sigmoid surrogates, ADA-DEFT.
    """

    paper: ClassVar[str] = "From PEFT to DEFT (2024), arXiv:2402.01911"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"last linears"})
    small: ClassVar[dict[str, float]] = {"eps": 0.1}
    excused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("equals_the_untouched_model", "equals_the_untouched_model_under_dropout"),
        "its term has a gradient from the first step; tests/methods/test_density.py holds the sum")

    weight: float = setting(1.0, "alpha, of the density", alias=("alpha",))
    eps: float = setting(1e-7, "x^2 at which a number counts half", other=(1e-3,))

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.eps <= 0:
            raise RecipeError(f"density: weight and eps above 0 are expected, got {self.weight} "
                              f"and {self.eps}")

    def activations(self, anatomy: Anatomy) -> Density:
        return self

    def objective(self, tuned: Tuned, run: Any) -> Iterable[Any]:
        return ()                                # its terms ride where the states pass

    def install(self, attacher: Attacher, part: Method) -> None:
        stacks = [[b.mlp_out for b in blocks if b.mlp_out]
                  for blocks in attacher.anatomy.stacks().values()]
        if not any(stacks):
            raise RecipeError("density: no block of this model has an MLP with a last linear")
        for paths in stacks:
            for path in paths:
                Dense(attacher.state, attacher.adapter.name, self.weight / len(paths),
                      self.eps).listen(attacher.slot(path), part.name)
