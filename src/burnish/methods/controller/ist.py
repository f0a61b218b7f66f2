from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ...blocks.update.live import Draw, TrainableSchedule
from ...blocks.update.noise import fold
from ...blocks.weight.term import Term, Wrap
from ...core.errors import ConfigError, RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ...core.processes import processes

if TYPE_CHECKING:
    from ...core.protocols import Pass
    from ...engine.tuned import Tuned

IDLE = ("suppressed", "candidates", "suppression", "every")
#: draws among which the candidates are the first that differ
TRIES = 50
DRAWS = "a few updates move the scores too little to draw other layers: tests/methods/test_ist.py"


@dataclass(frozen=True, kw_only=True)
class Ist(Method):
    """IST: of the layers of an adapter a few train at a time, those that matter more often.

    Every update the adapters of `layers` blocks train, drawn without replacement in proportion to
    ``sigma(-u_l)``. Every `every` updates `candidates` distinct sets of `suppressed` blocks are
    drawn in proportion to ``p = sigma(u)``; in each the adapter's updates are held down to
    `suppression` of themselves, and ``l_k`` is the loss of the batch then, in evaluation mode. With
    ``r_k = exp(-l_k)`` less its mean over k, ``u_l <- u_l + rate r_k p_l (1 - p_l)`` for all l of
    set k: u rises where holding down does no harm, and the block trains less often. ``rate=0``
    draws uniformly and looks at nothing (random sparse tuning).

    Start: u = 0, and what the adapter starts with. Trains what stands beside it, a few blocks at a
    time; tensors outside the blocks always. A block that rests has no gradient, so neither decay
    nor momentum moves it; its optimizer state stays (a promise is made with that of all blocks
    and with the lowest ones training). Backward ends at the lowest block that trains. Scores cost
    `candidates` forwards every `every` updates.

    The draws of an update depend on `seed`, its number and u. A function of W (DoRA's lengths) is
    not held down, what is added beside it is; where a block has nothing to hold down, it is
    refused. One process: others would score otherwise.

    Departure: the loss is that of the batch which trains next, not of a held-out one, which a
    step does not have; it has not trained the scored adapters yet.
    """

    paper: ClassVar[str] = ("Layer-wise Importance Matters: Less Memory for Better Performance in "
                            "Parameter-efficient Fine-tuning of Large Language Models, EMNLP "
                            "Findings 2024")
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        f"exactly_what_trains_moves on {model}": "six draws of one block in four leave one out; "
        "tests/methods/test_ist.py shows that exactly what is drawn moves"
        for model in ("clip", "swin", "t5", "whisper")} | {
        "every_setting_acts on graphs": "by chance scores move enough there to draw others, which "
                                        "settings called unseen then show"}
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    shown_beside: ClassVar[str] = "lora(rank=4)"
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "schedule")

    layers: int = setting(0, "blocks that train at a time; 0: a quarter of them")
    suppressed: int = setting(0, "blocks that a candidate holds down; 0: half of them",
                              unseen=DRAWS)
    candidates: int = setting(3, "sets that are compared, where there are so many", unseen=DRAWS)
    suppression: float = setting(0.25, "what is held down counts so much", unseen=DRAWS)
    rate: float = setting(10.0, "mu, step of the scores; 0: uniform draws", alias=("mu",),
                          unseen=DRAWS)
    every: int = setting(10, "updates between two scorings", unseen=DRAWS)
    seed: int = setting(0, "of the draws")

    def __post_init__(self) -> None:
        if min(self.layers, self.suppressed, self.rate) < 0 or self.candidates < 2 \
                or self.every < 1 or not 0 <= self.suppression < 1:
            raise RecipeError("ist: layers, suppressed and rate are not negative, candidates at "
                              "least 2, every at least 1 and suppression in [0, 1)")
        if idle := [] if self.rate else [n for n in IDLE if n in self.changed()]:
            raise RecipeError(f"ist: {idle[0]} does nothing at rate=0, where nothing is scored")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks",)

    def controller(self, tuned: Tuned) -> Turns:
        if processes() > 1 and self.rate:
            raise ConfigError("ist scores layers by what one process sees, and here are several, "
                              "which would train different layers; use one process, or rate=0")
        named = list(tuned.named_parameters())
        inside = {b.path: [p for n, p in named if n.startswith(f"{b.path}.")]
                  for b in tuned.anatomy.blocks}
        groups = {path: found for path, found in inside.items() if found}
        count = self.layers or max(1, len(groups) // 4)
        held = self.suppressed or max(1, len(groups) // 2)
        if len(groups) < 2 or max(count, held) > len(groups):
            raise RecipeError(f"ist: {count} layers train and {held} are held down, of the "
                              f"{len(groups)} blocks here that have something to train")
        held_down = [*(n for n, t in tuned.terms(Term) if not isinstance(t, Wrap)),
                     *(n for n, _ in tuned.branches(nn.Module))]
        for path in groups if self.rate else ():
            if not any(f"{n}.".startswith(f"{path}.") for n in held_down):
                raise RecipeError("ist holds updates and branches of an adapter down to score "
                                  f"them, and in {path} there is none; rate=0 scores nothing")
        return Turns(self, groups, count, held, tuned)


def sigma(u: float) -> float:
    """1 / (1 + e^-u), for any u."""
    return (1 + math.tanh(u / 2)) / 2


class Turns:
    """Whose turn it is, and the scores. Early, so that other handlers see what is live."""

    phase: ClassVar[int] = EARLY

    def __init__(self, method: Ist, groups: Mapping[str, Any], count: int, held: int,
                 tuned: Tuned):
        self.method, self.count, self.held = method, count, held
        self.scores = dict.fromkeys(groups, 0.0)
        self.schedule = TrainableSchedule(groups, lambda step: None, state_on_leave="keep",
                                          optimizer=lambda: tuned.current_optimizer)
        self.scored: int | None = None               # the update of the last scoring

    def draw(self, count: int, sign: float, step: int, nth: int) -> frozenset[str]:
        """So many layers, in proportion to sigma(sign u); the nth draw at a step."""
        weights = [sigma(sign * u) for u in self.scores.values()]
        return Draw(list(self.scores), count, 1, fold(self.method.seed, step), weights).period(nth)

    def step_begin(self, step: int) -> None:
        self.schedule.set(self.draw(self.count, -1, step, 0))

    def around_step(self, step: Pass) -> Iterator[None]:
        due = step.index % self.method.every == 0 and self.scored != step.index
        if self.method.rate and (due or self.scored is None):
            self.scored = step.index
            self.score(step)
        yield

    def sets(self, step: int) -> list[frozenset[str]]:
        """The candidates, each another; fewer where so many draws are all alike."""
        draws = (self.draw(self.held, 1, step, nth) for nth in range(1, TRIES))
        return list(dict.fromkeys(draws))[: self.method.candidates]

    def score(self, step: Pass) -> None:
        losses = []
        for names in (sets := self.sets(step.index)):
            with step.damped(names, self.method.suppression):
                losses.append(step.probe(grads=False, evaluate=True).loss)
        if any(isinstance(v, FakeTensor) for v in losses):
            return
        rewards = [math.exp(-float(v)) for v in losses]
        mean = sum(rewards) / len(rewards)
        before = {n: sigma(u) for n, u in self.scores.items()}
        for names, reward in zip(sets, rewards, strict=True):
            for n in names:
                p = before[n]
                self.scores[n] += self.method.rate * (reward - mean) * p * (1 - p)

    def rehearse(self, step: int) -> None:
        self.scored = None
        every, first = list(self.scores), self.count if step else len(self.scores)
        self.schedule.set(every[:first])             # at first all, which leave their state

    def state_dict(self) -> Mapping[str, Any]:
        return {**self.schedule.state_dict(), "scored": self.scored, "scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scored, self.scores = state["scored"], dict(state["scores"])
        self.schedule.load_state_dict(state)
