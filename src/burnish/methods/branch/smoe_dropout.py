from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.slimmed import Slimmed
from ...core.errors import RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ...core.needs import inner
from ._routed import divide, router

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.groups import Group
    from ...core.protocols import Attacher, Tuned
    from ...core.site import Place


@dataclass(frozen=True, kw_only=True)
class SmoeDropout(Method):
    """SMoE-Dropout: each token takes a few of an MLP's inner channels, by a random router that does
    not train, and more of them as training goes on.

    The F inner channels are `experts` runs of F / experts. ``l = R x + r``, the `k` largest of them
    answer: ``y = E sum_e w_e W2_e act(W1_e x + b1_e) + b2`` (gate and up alike), w the softmax of
    those l in fp32, E experts. In update t of T ``k(t) = round((k_end - k) t / T) + k``, cut to the
    two; without a known length (``tuned.total_steps``, set by fit) it stays at `k`. In evaluation
    `k_end` answer, all by default, and :meth:`lifecycle` lets fewer answer where that is to be
    cheap. R and r are torch's own start, and stay.

    Ours, for MLPs that are trained already: the factor E, without which convex weights would shrink
    an output to its E-th part, and equal weights where all answer, so that all are the MLP itself.
    Left out: the authors' other schedules (cosine, exponential, in steps), training from scratch.

    Start: of the MLP k / experts answer in training; in evaluation the pre-trained function. Trains
    nothing of its own; R and r are experts (d + 1) frozen numbers per MLP. Beside it stand
    low-rank updates without dropout, and weights that train whole; functions of weights and
    branches there are refused. k / experts of an MLP's products are made, and as many of its inner
    states kept. Not mergeable, and nothing to merge where all answer.
    """

    paper: ClassVar[str] = ("Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable "
                            "Transformers (2023), arXiv:2303.01610")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"inner channels"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    shown_beside: ClassVar[str] = "lora(rank=4)"
    #: all of them: in half precision a token near a tie goes elsewhere, in so small a model too far
    small: ClassVar[Mapping[str, Any]] = {"experts": 4, "k": 4}
    excused: ClassVar[Mapping[str, str]] = {
        "a_known_length_acts": "shown with all experts, whose number cannot rise; "
                               "tests/methods/test_smoe_dropout.py"}

    experts: int = setting(16, "runs of inner channels", other=(8,), beside={"k": 1})
    k: int | None = setting(None, "experts of a token as training begins; None: half of them",
                            other=(2, 1))
    k_end: int | None = setting(None, "as it ends, and in evaluation; None: all of them",
                                other=(3, 2), beside={"k": 1})

    def __post_init__(self) -> None:
        if self.experts < 2 or not 1 <= self.begins <= self.answers <= self.experts:
            raise RecipeError(f"{self}: expected at least 2 experts, and k and k_end from 1 to as "
                              "many, k no more than k_end")

    @property
    def begins(self) -> int:
        """Experts of a token as training begins."""
        return self.experts // 2 if self.k is None else self.k

    @property
    def answers(self) -> int:
        """Experts of a token in evaluation."""
        return self.experts if self.k_end is None else self.k_end

    def claims(self) -> tuple[str, ...]:
        return ("which inner channels of an MLP answer",)

    def branch(self, anatomy: Anatomy) -> Iterable[Experts]:
        found = inner(anatomy)
        if not found:
            raise RecipeError("smoe_dropout needs MLPs of linears whose inner channels can be "
                              "told, and this model has none")
        return [Experts(self, g) for g in found]

    def controller(self, tuned: Tuned) -> Growing:
        return Growing(self, _listeners(tuned, tuned.training))       # type: ignore[attr-defined]

    def at(self, step: int, total: int) -> int:
        """Experts of a token in an update."""
        first = self.begins
        return max(first, min(self.answers, round((self.answers - first) * step / total) + first))

    def lifecycle(self, tuned: Any, k: int) -> None:
        """From now on k experts answer in evaluation, in the adapter in use. (A file says `k_end`.)
        Raises RecipeError for a number that they do not have."""
        if not 1 <= k <= self.experts:
            raise RecipeError(f"smoe_dropout has 1 to {self.experts} experts, not {k}")
        for m in _listeners(tuned, tuned.training):
            m.answers = k

    def frozen(self, d: int) -> int:
        """Numbers of the router of an MLP with inputs of this width; none of them trains."""
        return self.experts * (d + 1)


def _listeners(tuned: Any, adapter: str | None) -> list[Slimmed]:
    return [m for m in tuned.model.modules() if isinstance(m, Slimmed) and m.adapter == adapter]


@dataclass(frozen=True)
class Experts:
    """The inner channels of one MLP are divided."""

    method: SmoeDropout
    group: Group

    def install(self, attacher: Attacher, part: Method) -> None:
        m, g = self.method, self.group

        def made(slot: Any, place: Place, first: bool) -> Slimmed:
            return Slimmed(attacher.state, attacher.adapter.name, slot, g.path, place == g.out,
                           k=m.begins, answers=m.answers,
                           router=router(attacher, place, m.experts) if first else None)

        divide(attacher, part, g, m.experts, made)


class Growing:
    """How many answer in an update. Early, so that it begins with as many as it is for."""

    phase: ClassVar[int] = EARLY

    def __init__(self, method: SmoeDropout, parts: list[Slimmed]):
        self.method, self.parts = method, parts
        self.total: int | None = None

    def start(self, total: int | None) -> None:
        self.total = total

    def step_begin(self, step: int) -> None:
        self.set(self.method.at(step, self.total) if self.total else self.method.begins)

    def rehearse(self, step: int) -> None:
        self.set(self.method.answers)            # as many as there will be

    def set(self, k: int) -> None:
        for m in self.parts:
            m.k = k

    def state_dict(self) -> Mapping[str, Any]:
        return {"total": self.total, "k": self.parts[0].k}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]
        self.set(state["k"])
