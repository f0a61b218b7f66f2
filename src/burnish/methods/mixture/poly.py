from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.state.another import beside
from ...blocks.weight.skills import Skills
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.recipe import make
from ...core.site import Branch, Place
from ...core.targets import match
from ..branch._sites import samples_first
from ..delta.lowrank.lora import check_rate
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Poly(Method):
    """Poly and MHR: an inventory of low-rank skills, of which every task has its own average.

    ``y = W x + b + s B_t A_t x``, s = alpha / rank, t the sample's task: the batch names ``task``.
    Slice h of A_t (rank, in), by its inputs, is ``sum_m w_m A_m``, and slice h of B_t (out, rank),
    by its outputs, ``sum_m w_m B_m``, with ``w_m = sigma(Z_t,h,m) / sum_j sigma(Z_t,h,j)``; A
    (experts, rank, in), B (experts, out, rank), Z (tasks, slices, experts), a router for every
    linear. slices=1 is Poly, more are MHR (preset ``mhr``). Factors are averaged, not outputs: a
    task's update has the rank of one skill, and costs what one does. With one task no key is read.

    :meth:`lifecycle` makes of a trained inventory what comes next: a task's own ``lora``, which
    merges exactly; the average of all skills as a ``lora`` to tune on (MHR-mu); or an inventory
    for one new task, of which all trains (MHR), or the logits alone (MHR-z). A routed expert of
    the model, which is given the tokens of all samples together, is left as it is, and a linear
    whose sides `slices` does not divide, where nobody asked for it.

    Start: A uniform in +-1/sqrt(in), B = 0, Z uniform in +-0.001: the pre-trained function
    exactly. Trains experts rank (in + out) + tasks slices experts per matrix;
    train_skills=False the latter alone, among skills that lifecycle gave it. Kept for backward: x;
    the rest is made again there. No weight decay. Z learns at `gate_rate` times the rate of the
    skills. (rank and alpha are unconfirmed, and how much larger the rate of Z is; PEFT's POLY
    has one for all, and draws the gates in training, noisy=True, as the paper's equation does not.)
    """

    paper: ClassVar[str] = ("Multi-Head Adapter Routing for Cross-Task Generalization (2022), "
                            "arXiv:2211.03831")
    tier: ClassVar[str] = "checked against an independent equation"
    context: ClassVar[Mapping[str, Key]] = {"task": Key("one task id per sample", below="tasks")}
    needs: ClassVar[frozenset[str]] = frozenset({"linears"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False

    rank: int = setting(1, "of every skill, and of a task's update", alias=("r",))
    alpha: float = setting(1.0, "numerator of the scale", alias=("lora_alpha",))
    experts: int = setting(8, "skills of an inventory", alias=("n_skills", "skills"))
    tasks: int = setting(2, "how many tasks", alias=("n_tasks",))
    slices: int = setting(1, "of the factors, with gates of their own", alias=("n_splits",),
                          other=(2,))
    noisy: bool = setting(False, "gates are drawn in training: relaxed Bernoulli of the logits")
    gate_rate: float = setting(10.0, "learning rate of Z over that of the skills")
    train_skills: bool = setting(
        True, "False freezes A and B (MHR-z)",
        unseen="it is refused before there are skills: tests/methods/test_poly.py")

    def __post_init__(self) -> None:
        if min(self.rank, self.experts, self.tasks, self.slices) < 1:
            raise RecipeError(f"{self}: expected rank, experts, tasks and slices of at least 1")
        check_rate("poly", self.gate_rate, "gate_rate")

    def keys(self) -> Mapping[str, Key]:
        return self.context if self.tasks > 1 else {}

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        several = self.tasks > 1 or self.noisy
        if several:
            samples_first(anatomy, self)
        asked = wanted(anatomy, self)
        left = ""
        sites = linears(anatomy, self, match(anatomy) if asked is None else asked, anywhere=True,
                        samples=several, rank=self.rank)
        found = [(place, rows, out, out if rows is None else sum(b - a for a, b in rows))
                 for place, rows, out in sites]
        for place, rows, out, width in found:
            if place.inp % self.slices or width % self.slices:
                left = f"poly(slices={self.slices}): {place.path} has {place.inp} inputs and " \
                       f"{width} outputs, which are no {self.slices} equal slices"
                if anatomy.asked.of(self)[0] is not None:
                    raise RecipeError(left)
                continue
            yield Branch(place.path, Skills(
                place.inp, out, self.experts, self.rank, self.tasks, self.slices,
                scale=self.alpha / self.rank, noisy=self.noisy, routed=not self.train_skills,
                rows=rows, rate=self.gate_rate), read=(place.path, "input"))
        if left and all(p.inp % self.slices or w % self.slices for p, _, _, w in found):
            raise RecipeError(left)

    def lifecycle(self, tuned: Any, task: int | None, name: str,
                  then: Literal["lora", "all", "router"] = "lora") -> None:
        """Add an adapter `name` beside the one in use (which must train this method), and use it.

        "lora": a ``lora`` of this task's factors, which needs no key and merges; of the average of
        all skills where task is None (MHR-mu). "all", "router": a ``poly`` of one task, whose gates
        begin at this task's, or (None) all alike, as for a task never seen; all of it trains, or
        the gates alone. Raises RecipeError for a task that is none.
        """
        if task is not None and not 0 <= task < self.tasks:
            raise RecipeError(f"poly has tasks 0 to {self.tasks - 1}, not {task}; None is one of "
                              "its own")
        mine = dict(tuned.branches(Skills))
        if then == "lora":
            made = {path: m.plain(task) for path, m in mine.items()}
            other = make("lora", {"rank": self.rank, "alpha": float(self.rank),
                                  "targets": list(made)})
        elif then in ("all", "router"):
            made = {path: m.for_one(task) for path, m in mine.items()}
            other = replace(self, tasks=1, train_skills=then == "all",
                            targets=_named(tuned.anatomy, mine))
        else:
            raise RecipeError(f"poly becomes 'lora', 'all' or 'router', not {then!r}")
        beside(tuned, self, name, [(other, made)])

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        skills = self.experts * self.rank * (place.inp + place.out) if self.train_skills else 0
        return skills + self.tasks * self.slices * self.experts


def _named(anatomy: Anatomy, mine: Mapping[str, Skills]) -> list[str]:
    """Targets that name these linears, and the rows of fused ones, and no others."""
    names = []
    for place in (p for p in anatomy.places if p.path in mine):
        rows = mine[place.path].rows
        names += [place.name] if rows is None else \
            [part.name for part in anatomy.slices(place) if part.rows in rows]
    return names
