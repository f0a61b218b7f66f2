from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...blocks.update.live import TrainableSchedule
from ...blocks.update.noise import fold
from ...blocks.weight.term import Term
from ...core.errors import RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.protocols import Pass
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class AdapterDrop(Method):
    """AdapterDrop: in every update the first n blocks go without their adapters, n drawn anew.

    ``h_l = F_l(h_(l-1))`` for l < n, ``h_l = a_l(F_l(h_(l-1)))`` from n on; n uniform in 0 .. L - 1
    for the whole batch (robust AdapterDrop), of each stack alike where there are several, L the
    shortest's blocks. Whatever the parts beside it add inside a block is its adapter. Afterwards
    the adapter serves at any n: ``with tuned.dropped(n): ...`` (5 of 12 in the paper); outside it
    is whole. Specialised AdapterDrop, n fixed from the start, is an adapter that has no place
    below: ``houlsby(targets="o@5:,fc2@5:", norms=False)``.

    Start: that of the adapter; trains what stands beside it. What rests has no gradient, so neither
    decay nor momentum moves it; its optimizer state stays. Tensors that adapters share train with
    whoever reads them. Kept for backward: nothing in the first n blocks, which no gradient passes:
    (L - n) / L of what the adapter keeps otherwise. A promise is of n = 0, the dearest.

    The draw of an update depends on `seed` and its number alone: the same in every process, and
    after a resume. Refused where something trains outside the blocks other than the head and final
    norms (embeddings, their norm), or inside them without being an adapter's (prompts).
    """

    paper: ClassVar[str] = ("AdapterDrop: On the Efficiency of Adapters in Transformers (2021), "
                            "arXiv:2010.11918")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    shown_beside: ClassVar[str] = "houlsby(bottleneck=4, norms=False, init='zero')"
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "schedule")

    seed: int = setting(0, "of the draws")

    def repeats(self) -> int | None:
        return None

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks",)

    def controller(self, tuned: Tuned) -> Drops:
        return Drops(self, tuned)

    def drawn(self, step: int, most: int) -> int:
        """n of an update, from 0 to most - 1."""
        return random.Random(fold("adapterdrop", self.seed, step)).randrange(most)


class Drops:
    """Who rests in an update, and does not answer in its passes."""

    phase: ClassVar[int] = EARLY

    def __init__(self, method: AdapterDrop, tuned: Tuned):
        self.method, self.n = method, 0
        runs = tuned.anatomy.runs()
        self.most = min(map(len, runs))
        self.below = [[b.path for run in runs for b in run[:n]] for n in range(self.most)]
        parts: list[Any] = [m for _, m in (*tuned.terms(Term), *tuned.branches(nn.Module))]
        added = {id(p) for m in parts for p in m.parameters()}
        shared = {id(p) for m in parts for p in getattr(m, "borrowed", ())}
        paths = [b.path for b in tuned.anatomy.blocks]
        above = [*tuned.anatomy.head, *tuned.anatomy.final_norms.values()]
        self.levels: dict[str, list[nn.Parameter]] = {p: [] for p in paths}
        for name, p in tuned.named_parameters():
            block = next((b for b in paths if name.startswith(f"{b}.")), None)
            if block is None and not name.startswith(("burnish.", *(f"{a}." for a in above))):
                raise RecipeError(f"adapterdrop: {name} trains, which stands before the blocks or "
                                  "beside them, so no block could go without a gradient; leave it "
                                  "out (norms=False, other targets)")
            if block and ".burnish." in name and id(p) not in added:
                raise RecipeError(f"adapterdrop: {name} trains in a block and is no adapter that "
                                  "could be left out; drop the part that holds it")
            if block and id(p) not in shared:
                self.levels[block].append(p)
        if self.most < 2 or not added:
            raise RecipeError("adapterdrop leaves the adapters of the first blocks out, and here "
                              + ("is one block alone" if added else "are none"))
        self.schedule = TrainableSchedule(self.levels, lambda step: None, state_on_leave="keep",
                                          optimizer=lambda: tuned.current_optimizer)

    def set(self, n: int) -> None:
        self.n = n
        self.schedule.set(set(self.levels) - set(self.below[n]))

    def step_begin(self, step: int) -> None:
        self.set(self.method.drawn(step, self.most))

    def around_step(self, step: Pass) -> Iterator[None]:
        with step.damped(self.below[self.n], 0.0):
            yield

    def rehearse(self, step: int) -> None:
        self.set(0)

    def state_dict(self) -> Mapping[str, Any]:
        return {**self.schedule.state_dict(), "n": self.n}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.n = state["n"]
        self.schedule.load_state_dict(state)
