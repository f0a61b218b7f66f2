from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from ...blocks.update.objective import OnWeights
from ...blocks.weight.factor import Chain
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.stage import Stage

if TYPE_CHECKING:
    from ...engine.tuned import Tuned


def overlap(A: Tensor, others: list[Tensor], norm: str) -> Tensor:
    """``sum_i ||A_i A^T||_F^2`` ("squared"), or the sum of absolute entries ("absolute")."""
    made = [other.to(A.dtype) @ A.t() for other in others]
    return sum((m.square() if norm == "squared" else m.abs()).sum() for m in made)


_ALONE = "it is against adapters learnt before, and a fresh model has none: " \
         "tests/methods/test_o_lora.py"


@dataclass(frozen=True, kw_only=True)
class OLora(Method):
    """O-LoRA: a new task's LoRA keeps to directions that earlier tasks have left free.

        loss + weight sum_places sum_{i < t} ||A_i A_t^T||^2

    A_t (rank, in) of the adapter that trains, A_i (rank_i, in) of the others on the same place:
    rows of A span the inputs an update reads, so orthogonal rows keep the tasks apart. The others
    stay as they are, and stay active: an answer is the base plus the sum of all tasks' updates.
    Written beside a low-rank delta: ``lora(rank=8) + o_lora``, one adapter per task, in stages
    (``burnish.fit`` with several data sets, or ``tuned.run(method.stages(tuned, tasks), data)``) or
    by hand (``tuned.add``, ``tuned.use({...}, train=...)``); the first task has nothing to be
    orthogonal to.

    Trains nothing of its own; costs rank x rank_i products of length `in` per place and update.
    The authors' code sums absolute entries (norm="absolute"), the paper squares.
    """

    paper: ClassVar[str] = ("Orthogonal Subspace Learning for Language Model Continual Learning "
                            "(2023), arXiv:2310.14152")
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "beside_a_partner_it_acts":
            "its term is against adapters learnt before, and a fresh model has none; "
            "tests/methods/test_o_lora.py"}

    weight: float = setting(0.5, "lambda_1, of the overlap", alias=("lamda_1",), unseen=_ALONE)
    norm: Literal["squared", "absolute"] = setting("squared", "of the entries of A_i A^T",
                                                      unseen=_ALONE)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        active = tuned.training
        mine = dict(tuned.terms(Chain))
        if not mine and len(tuned.adapters) > 1:
            self._nothing(tuned)
        for place, term in mine.items():
            others = [t.A for name in tuned.adapters if name != active
                      for p, t in tuned.terms(Chain, name) if p == place]
            if others and isinstance(term.A, nn.Parameter):
                yield OnWeights((term.A,), partial(self._term, term.A, others))

    def stages(self, tuned: Tuned, tasks: Sequence[str]) -> Iterator[Stage]:
        """A task after the other, each in an adapter of its name beside those before it."""
        recipe = tuned.recipe
        if tasks and next(tuned.terms(Chain), None) is None:
            self._nothing(tuned)
        for i, task in enumerate(tasks):
            yield Stage(task, recipe, dict.fromkeys(tasks[:i], 1.0), data=task)

    def _nothing(self, tuned: Tuned) -> None:
        raise RecipeError(f"o_lora keeps the A of low-rank updates B A apart, and {tuned.recipe} "
                          "has none: lora(rank=8) + o_lora")

    def _term(self, A: nn.Parameter, others: list[Tensor]) -> Tensor:
        return self.weight * overlap(A, [o.detach() for o in others], self.norm)
