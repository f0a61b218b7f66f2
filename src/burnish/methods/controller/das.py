from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch._subclasses.fake_tensor import FakeTensor

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.skipped import Skippable
from ...blocks.update.live import Draw, TrainableSchedule
from ...blocks.update.noise import fold
from ...core.errors import ConfigError, RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.processes import processes
from .ist import TRIES, sigma

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy, Block
    from ...core.protocols import Attacher, Pass, Tuned

#: behind a block's name: what trains in it beside its own adapter
BESIDE = " beside"
FEW = "six updates of two blocks: tests/methods/test_das.py"


@dataclass(frozen=True, kw_only=True)
class Das(Method):
    """DAS: of the blocks those that matter least are looked for, and an adapter takes their place.

    K = `layers` blocks are skipped: ``x <- x + s (W_up relu(W_down LN(x) + b) + b')``. For a share
    `warmup` of a run other K in every update, uniformly; up to `search` drawn without replacement
    in proportion to ``p = sigma(g)``, and every `every` updates `candidates` distinct sets S_j are
    compared: with R_j = exp(-loss) of the batch in evaluation mode, less its mean over j,
    ``g_i <- g_i + R_j p_i (1 - p_i)`` for i in S_j: g rises where skipping does no harm. Then the K
    largest stay skipped (of equals the first). What else trains in a skipped block rests. Where
    ``tuned.total_steps`` is not known gates are compared from the first update to the last. What
    kept blocks learn are parts beside it: ``lora + das``.

    Start: the first K blocks are skipped, weights N(0, 0.02): not the pre-trained function.
    Trains 2 d r + r + 3 d per skipped block (444,960 at d = 768, r = 288); the adapters of the
    others rest. Kept for backward: of a skipped block x and r numbers per token, nothing frozen.
    Not mergeable: the weights of skipped blocks may be deleted. A cache counts tokens all the same.

    Departures: one run in place of a search and a fresh start (adapters go on from the search); the
    loss is of the batch that trains next, not of a held-out one. One process.
    """

    paper: ClassVar[str] = ("Parameter and Computation Efficient Transfer Learning for "
                            "Vision-Language Pre-trained Models (2023), arXiv:2309.01479")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"one width"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "schedule")
    small: ClassVar[Mapping[str, Any]] = {"layers": 1, "every": 1, "warmup": 0.3, "search": 0.8,
                                          "seed": 1}
    excused: ClassVar[Mapping[str, str]] = {
        "every_tensor_has_a_gradient": "adapters of blocks that run have none: "
                                       "tests/methods/test_das.py",
        "exactly_what_trains_moves on points": "by chance: its four units are closed for the tokens"
                                               " that are read",
        "bf16_is_near_fp32 on graphs": "another node is the largest there: with a mean in the place"
                                       " of the maximum it is near"}

    layers: int = setting(4, "K, blocks that are skipped", unseen="small models have two "
                          "blocks, of which one runs: tests/methods/test_das.py")
    bottleneck: int = setting(288, "r, width of the bottleneck")
    scale: float = setting(1.0, "s")
    warmup: float = setting(0.1, "share of the run with uniform draws")
    search: float = setting(0.3, "share of the run after which it is settled")
    every: int = setting(10, "updates between two comparisons", unseen=FEW)
    candidates: int = setting(3, "sets that are compared, where there are so many", unseen=FEW)
    seed: int = setting(0, "of the draws")

    def __post_init__(self) -> None:
        if min(self.layers, self.bottleneck - 1, self.every - 1, self.candidates - 2) < 0 \
                or not 0 <= self.warmup <= self.search <= 1:
            raise RecipeError(f"{self}: expected layers of 0 or more, bottleneck and every of 1 or "
                              "more, 2 candidates or more, 0 <= warmup <= search <= 1")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks",)

    def branch(self, anatomy: Anatomy) -> Iterable[Stands]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        if self.targets is not None:
            raise RecipeError("das takes no targets: it looks among all blocks")
        if self.layers >= len(anatomy.blocks):
            raise RecipeError(f"das(layers={self.layers}): this model has {len(anatomy.blocks)} "
                              "blocks, of which one at least is to run")
        for i, b in enumerate(anatomy.blocks if self.layers else ()):
            yield Stands(self, b, i < self.layers)

    def controller(self, tuned: Tuned) -> Skips | None:
        if processes() > 1:
            raise ConfigError("das compares blocks by what one process sees, and here are several")
        found = {b.path: [m for m in tuned.model.get_submodule(b.path).modules()
                          if isinstance(m, Skippable) and any(p.requires_grad
                                                              for p in m.parameters())]
                 for b in tuned.anatomy.blocks}
        mine = {path: m[-1] for path, m in found.items() if m}
        return Skips(self, mine, tuned, _beside(tuned, mine)) if mine else None

    def count(self, d: int) -> int:
        """Trainable parameters of one skipped block of width d."""
        return Bottleneck.count(d, self.bottleneck) + 2 * d


@dataclass(frozen=True)
class Stands:
    """An adapter that may stand in the place of one block."""

    method: Das
    block: Block
    first: bool

    def install(self, attacher: Attacher, part: Method) -> None:
        m, b = self.method, self.block
        if b.hidden_size is None:
            raise RecipeError(f"das: the width of {b.path} cannot be told from its weights")
        f = Bottleneck(b.hidden_size, m.bottleneck, scale=m.scale, norm="in", init="bert")
        made = Skippable(attacher.state, attacher.adapter.name, f).to(attacher.device(b.path))
        made.skip(self.first)
        made.listen(attacher.slot(b.path), part.name)


def _beside(tuned: Tuned, blocks: Mapping[str, Skippable]) -> dict[str, list[Any]]:
    """What else trains in each block, and in no other: it rests while the block is skipped."""
    own = {id(p) for m in blocks.values() for p in m.parameters()}
    found = {n: [p for p in tuned.model.get_submodule(n).parameters()
                 if p.requires_grad and id(p) not in own] for n in blocks}
    count = Counter(id(p) for some in found.values() for p in some)
    alone = {n: [p for p in some if count[id(p)] == 1] for n, some in found.items()}
    return {n: some for n, some in alone.items() if some}


class Skips:
    """Which blocks are skipped, and the gates. Early, so that other handlers see what is live."""

    phase: ClassVar[int] = EARLY

    def __init__(self, method: Das, blocks: Mapping[str, Skippable], tuned: Tuned,
                 beside: Mapping[str, list[Any]]):
        self.method, self.blocks, self.beside = method, dict(blocks), beside
        self.gates, self.total = dict.fromkeys(blocks, 0.0), tuned.total_steps
        self.schedule = TrainableSchedule(
            {**{n: list(m.parameters()) for n, m in blocks.items()},
             **{n + BESIDE: own for n, own in beside.items()}},
            lambda step: None, state_on_leave="keep", optimizer=lambda: tuned.current_optimizer)
        self.scored: int | None = None               # the update of the last comparison

    def start(self, total: int | None) -> None:
        self.total = total

    def draw(self, step: int, nth: int, even: bool) -> frozenset[str]:
        """K blocks; the nth draw at an update."""
        weights = None if even else [sigma(g) for g in self.gates.values()]
        return Draw(list(self.gates), self.method.layers, 1, fold(self.method.seed, step),
                    weights).period(nth)

    def settled(self) -> list[str]:
        """The K largest gates."""
        return sorted(self.gates, key=lambda n: -self.gates[n])[: self.method.layers]

    def set(self, names: Iterable[str]) -> None:
        names = set(names)
        for n, m in self.blocks.items():
            m.skip(n in names)
        self.schedule.set(names | {n + BESIDE for n in self.beside if n not in names})

    def over(self, step: int, share: float, unknown: bool = False) -> bool:
        return unknown if self.total is None else step >= share * self.total

    def step_begin(self, step: int) -> None:
        m = self.method
        self.set(self.settled() if self.over(step, m.search)
                 else self.draw(step, 0, not self.over(step, m.warmup, True)))

    def around_step(self, step: Pass) -> Iterator[None]:
        m, at = self.method, step.index
        if at % m.every == 0 and self.scored != at and self.over(at, m.warmup, True) \
                and not self.over(at, m.search):
            self.scored = at
            self.compare(step)
        yield

    def compare(self, step: Pass) -> None:
        draws = (self.draw(step.index, nth, False) for nth in range(1, TRIES))
        sets, losses = list(dict.fromkeys(draws))[: self.method.candidates], []
        was = [n for n, m in self.blocks.items() if m.on]
        for names in sets:
            for n, m in self.blocks.items():
                m.skip(n in names)
            losses.append(step.probe(grads=False, evaluate=True).loss)
        for n, m in self.blocks.items():
            m.skip(n in was)
        if not any(isinstance(v, FakeTensor) for v in losses):
            self.learn(sets, [math.exp(-float(v)) for v in losses])

    def learn(self, sets: list[frozenset[str]], rewards: list[float]) -> None:
        """g of each set's blocks, by its reward less their mean."""
        mean, before = sum(rewards) / len(rewards), {n: sigma(g) for n, g in self.gates.items()}
        for names, reward in zip(sets, rewards, strict=True):
            for n in names:
                self.gates[n] += (reward - mean) * before[n] * (1 - before[n])

    def rehearse(self, step: int) -> None:
        self.scored, names = None, [*self.blocks, *self.blocks]
        at = step * self.method.layers % len(self.blocks)
        self.set(names[at : at + self.method.layers])

    def told(self) -> Mapping[str, Any]:
        return {"gates": self.gates, "skipped": [n for n, m in self.blocks.items() if m.on]}

    def state_dict(self) -> Mapping[str, Any]:
        return {**self.schedule.state_dict(), "scored": self.scored, "gates": self.gates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scored, self.gates = state["scored"], dict(state["gates"])
        self.schedule.load_state_dict(state)
