from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.attending import open_attentions
from ...blocks.state.chosen import Coded
from ...blocks.state.quantised import Codebook
from ...blocks.update.live import TrainableSchedule
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ..prompt._stacks import key_width

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher, Tuned


@dataclass(frozen=True, kw_only=True)
class PqAttention(Method):
    """SPT's sparse attention: each query attends to the keys whose product codes agree with its.

    ``out_i = sum_{j in K(i)} p_ij v_j``, p the softmax over K(i) of ``clamp(t q_i k_j, -10, 10)``,
    t the scale of the attention. A head of width h falls into h / `subspace` sub-spaces of `words`
    codewords; a code is the nearest word by l1 distance. K(i): of the keys that i may see the
    ``ceil(attended n)`` (n tokens) that share most codes with it; among equals those nearest to i.
    Early queries of a causal attention see fewer and attend to all of these. ``attended=1`` is the
    dense attention where no scaled score is beyond 10.

    Codebook loss, for z = q and z = k of each attention, as the attention sees them:
    ``mean (z - z^)^2 + mean (softmax(-log dist) C - z^)^2``, z^ the nearest words, times `weight`;
    padding is left out. It rides on the first `warmup` updates and on each `every`-th after them,
    and moves queries and keys too unless ``pulls=False``. It alone trains codebooks: a choice has
    no gradient.

    Start: words N(0, 1); never the pre-trained function. Trains words * h per attention, one set
    for all its heads. Kept for backward: q, k, v, h / subspace bytes for each query and each key
    and a number per query; nothing of tokens^2 (but a mask of the model's own). Not mergeable; LoRA
    beside it merges, and the sparsity may then be dropped.

    Works wherever attention calls ``F.scaled_dot_product_attention`` on its own sequence; a cache
    and cross-attention stay exact. A fused exact attention keeps no tokens^2 either and is faster
    where no kernel serves the sparse one: scores are made whole, a strip of rows at a time.

    Departures: strips that are made again in backward, not n^2 / 8 values and indices; which of
    equal keys are taken; any number of tokens; `warmup`, `every` and `weight` are ours, and in the
    warm-up attention is sparse already, where the authors' prototype keeps it dense.
    """

    paper: ClassVar[str] = ("SPT: Fine-Tuning Transformer-based Language Models Efficiently with "
                            "Sparsification (2023), arXiv:2312.10365")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"open attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    shown_beside: ClassVar[str] = "lora(rank=4)"
    small: ClassVar[Mapping[str, Any]] = {"attended": 0.5, "words": 4, "subspace": 2, "warmup": 1,
                                          "every": 2}

    attended: float = setting(1 / 8, "share of the keys that a query attends to", other=(0.25,))
    words: int = setting(16, "codewords of a sub-space")
    subspace: int = setting(8, "numbers of a sub-space", other=(1,))
    weight: float = setting(1.0, "of the codebook loss")
    warmup: int = setting(100, "updates in which codebooks learn, from the first on")
    every: int = setting(10, "and in every n-th update after these; 0: in none")
    pulls: bool = setting(True, "the codebook loss moves queries and keys too")

    def __post_init__(self) -> None:
        if not 0 < self.attended <= 1:
            raise RecipeError(f"pq_attention(attended={self.attended}): expected a share above "
                              "0, at most 1")
        if not 1 < self.words <= 256 or self.subspace < 1:
            raise RecipeError("pq_attention: 2 to 256 words of at least 1 number, got "
                              f"words={self.words}, subspace={self.subspace}")
        if self.weight <= 0 or min(self.warmup, self.every) < 0 or not self.warmup + self.every:
            raise RecipeError("pq_attention: codebooks learn nothing, or not as often as is said; "
                              "expected weight above 0, warmup and every not negative nor both 0, "
                              f"got {self.weight}, {self.warmup} and {self.every}")

    def claims(self) -> tuple[str, ...]:
        return ("how attention is computed",)

    def branch(self, anatomy: Anatomy) -> Iterable[Codes]:
        paths = open_attentions(anatomy, self.name)
        for number, block in enumerate(anatomy.blocks):
            if block.attn in paths:
                whole = key_width(anatomy, number, block, "", self.name)
                yield Codes(self, block.attn, whole // (block.kv_heads or 1))

    def controller(self, tuned: Tuned) -> Lessons:
        return Lessons(self, tuned)

    def count(self, h: int) -> int:
        """Trainable parameters of an attention with heads of this width."""
        return self.words * h


@dataclass(frozen=True)
class Codes:
    """One attention, with heads of width h, is answered otherwise."""

    method: PqAttention
    path: str
    h: int

    def install(self, attacher: Attacher, part: Method) -> None:
        m = self.method
        if self.h % m.subspace:
            raise RecipeError(f"{m.name}(subspace={m.subspace}) does not divide heads of width "
                              f"{self.h} ({self.path})")
        made = Coded(attacher.state, attacher.adapter.name, Codebook(self.h, m.words, m.subspace),
                     m.attended, m.weight, m.pulls).to(attacher.device(self.path))
        made.listen(attacher.slot(self.path), part.name)


class Lessons:
    """In which updates codebooks learn; they keep their moments meanwhile."""

    def __init__(self, method: PqAttention, tuned: Tuned):
        self.method = method
        words = [m.codebook.words for m in tuned.model.modules() if isinstance(m, Coded)]
        self.schedule = TrainableSchedule({"words": words}, self.live, state_on_leave="keep",
                                          optimizer=lambda: tuned.current_optimizer)

    def live(self, step: int) -> tuple[str, ...]:
        m = self.method
        due = step < m.warmup or m.every > 0 and (step - m.warmup) % m.every == 0
        return ("words",) if due else ()

    def step_begin(self, step: int) -> None:
        self.schedule.update(step)

    def rehearse(self, step: int) -> None:
        self.schedule.set(("words",))

    def state_dict(self) -> Mapping[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state)
