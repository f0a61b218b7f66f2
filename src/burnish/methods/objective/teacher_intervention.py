from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.state.attending import open_attentions
from ...blocks.state.intervened import Answer, Led, Signals, Unheard, read
from ...core.anatomy import Anatomy
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import qkv_linears

if TYPE_CHECKING:
    from ...engine.tuned import Tuned

MODES = ("output", "context", "map")


@dataclass(frozen=True, kw_only=True)
class TeacherIntervention(Method):
    """Teacher Intervention: at first the base answers for attentions that are coded, while they
    learn to.

        loss + sum over attentions of ( maps mean (S - S')^2 + outputs mean (y - y')^2 )

    S = q k^T / sqrt(h) the scores, y what the last linear o gives, primes the base's on the same
    batch (in evaluation, without gradients). In the first `steps` updates an attention's own answer
    does not go on, so that what is rounded in one block is not heard in the next:

        output      y' goes on; q, k, v and o learn from their own terms, their input being fixed
        context     o(c') goes on, c' what the base's last linear reads
        map         o(softmax(S') v) goes on; q and k learn from their own term

    `mode` "gradual": output up to steps / 6, context up to steps / 3, then map; "inverted": map,
    context, output, a third each; "stochastic": one of the three at random in each update; or one
    of them all the time. Afterwards the model is itself, the two terms remain. 60 steps as
    published, 120 for CoLA and for small models. Beside what codes the weights and further
    distillation, which share one forward of the teacher:

        full + twn + teacher_intervention + distill(temperature=1.0) + feature_distill

    Trains nothing of its own. The teacher is the tuned model switched off, which runs ahead of each
    forward that trains; its scores and outputs of all layers are held until backward. Nothing
    stands in the model in evaluation, and a file has no tensor of it. Start: what the parts beside
    it say. Gradients are not those of the loss: they stop where the base answers.

    Reading (unconfirmed): the own output of a replaced attention is that of its own context, but
    for "map"'s, which is what goes on. Departure: the task's loss counts too, where the authors
    learn from the teacher alone.
    """

    paper: ClassVar[str] = ("Teacher Intervention: Improving Convergence of Quantization Aware "
                            "Training for Ultra-Low Precision Transformers, EACL 2023, "
                            "arXiv:2302.11812")
    tier: ClassVar[str] = "checked against an independent equation"
    exact: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"open attention", "queries alone"})
    shown_beside: ClassVar[str] = "full + twn"
    #: norms that attention alone reads get no gradient while the base answers for it
    small: ClassVar[dict[str, int]] = {"steps": 1}
    excused: ClassVar[dict[str, str]] = {
        "identity_at_the_start": "shown beside twn, whose start is the coded model; "
                                 "tests/methods/test_teacher_intervention.py has it alone"}

    mode: Literal["gradual", "inverted", "stochastic", "output", "context", "map"] = setting(
        "gradual", "whose place the base's signals take, and when", other=("map",))
    steps: int = setting(60, "updates in which they do", alias=("s",), other=(4,))
    maps: float = setting(1.0, "weight of the scores' term")
    outputs: float = setting(1.0, "weight of the outputs' term")
    seed: int = setting(0, "of what is drawn", beside={"mode": "stochastic"}, other=(2,))

    def __post_init__(self) -> None:
        if self.steps < 1 or min(self.maps, self.outputs) < 0:
            raise RecipeError("teacher_intervention: steps of at least 1, maps and outputs of at "
                              f"least 0 are expected, got {self.steps}, {self.maps:g} and "
                              f"{self.outputs:g}")
        if self.mode != "stochastic" and "seed" in self.changed():
            raise RecipeError("teacher_intervention: seed does nothing but beside "
                              "mode='stochastic'")

    def claims(self) -> tuple[str, ...]:
        return ("how attention is computed",)

    def at(self, step: int) -> str | None:
        """What of the base goes on in an update, from 0; None: nothing."""
        s = self.steps
        if step >= s:
            return None
        if self.mode == "gradual":
            return MODES[0 if 6 * step < s else 1 if 3 * step < s else 2]
        if self.mode == "inverted":
            return MODES[2 - 3 * step // s]
        if self.mode == "stochastic":
            return random.Random(f"{self.seed} {step}").choice(MODES)
        return self.mode

    def outs(self, anatomy: Anatomy) -> dict[str, str]:
        """Path of each attention -> its last linear."""
        open_attentions(anatomy, self.name)
        if fused := next((p for p in qkv_linears(anatomy) if p.role in ("qkv", "kv")), None):
            raise RecipeError(f"teacher_intervention: {fused.name} makes queries, keys and values "
                              "at once, and some of them are to learn alone")
        found = {b.attn: b.attn_out for b in anatomy.blocks if b.attn}
        if bare := next((a for a, o in found.items() if o is None or o == a), None):
            raise RecipeError(f"teacher_intervention: {bare} has no last linear of its own")
        return {str(a): str(o) for a, o in found.items()}

    def branch(self, anatomy: Anatomy) -> Iterable[Intervention]:
        for path, out in self.outs(anatomy).items():
            yield Intervention(self, path, out)

    def ahead(self, tuned: Tuned, run: Any) -> Signals:
        signals = Signals(self.at(tuned.timeline.step))
        with read(tuned.model, self.outs(tuned.anatomy), signals):
            run.reference()
        return signals


@dataclass(frozen=True)
class Intervention:
    """One attention."""

    method: TeacherIntervention
    path: str
    out: str

    def install(self, attacher: Any, part: Method) -> None:
        state, name, m = attacher.state, attacher.adapter.name, self.method
        Led(state, name, m.name, self.path).listen(attacher.slot(self.path), m.name)
        Answer(state, name, m.name, self.path, m.maps, m.outputs).listen(
            attacher.slot(self.out), m.name)
        for place in qkv_linears(attacher.anatomy):
            if place.path.startswith(f"{self.path}."):
                modes = MODES[:2] if place.role == "v" else MODES
                Unheard(state, name, m.name, self.path, modes).listen(
                    attacher.slot(place.path), m.name)
