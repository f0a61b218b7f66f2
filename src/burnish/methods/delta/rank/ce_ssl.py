from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ....blocks.update.noise import fold
from ....blocks.weight.thinned import FactorGradient, Thinned
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout

if TYPE_CHECKING:
    from ....core.protocols import Pass
    from ....engine.tuned import Tuned

#: lost beside any number that a layer gives
NOTHING = 1e-38


@dataclass(frozen=True, kw_only=True)
class CeSsl(Method):
    """CE-SSL: LoRA that rests at random, layer by layer, with ranks allotted in one look at data.

    In training ``W + z s B A``, z = 0 with probability p = `deactivation`, drawn for each layer
    and pass, for the whole batch; otherwise ``W + (1 - p) s B A``, its mean: so is the merge. A
    layer that rests forms and keeps nothing, and its gradient is zero. With B = 0 each batch of
    the calibration data says of a layer ``mean((W * s dL/dB A)^2)`` (``score="taylor"``) or without
    W ("fisher"); the `low` share of layers with the least mean get rank // 4 * 2, the others
    `rank`. ``score="none"``: all the same, and no data are read.

    Start: A normal of deviation 0.02 (drawn again once ranks are known), B = 0: the pre-trained
    function exactly. Trains sum of r_l (in + out); the paper trains all biases too: ``ce_ssl +
    bitfit``. Kept for backward and merging as LoRA. The file knows the ranks, so a load needs no
    data. In a loop that makes its own passes nothing rests unless ``tuned.backward`` makes them.

    Departure: a convolution is the matrix out x (in * kernel), as for `lora`. (s is unconfirmed.)
    What else the adapter adds to a layer that rests, rests with it.
    """

    paper: ClassVar[str] = ("CE-SSL: Computation-Efficient Semi-Supervised Learning for ECG-based "
                            "Cardiovascular Diseases Detection (2024), arXiv:2406.14377")
    tier: ClassVar[str] = "checked against an independent equation"
    by_data: ClassVar[bool] = True
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("around_step",)
    small: ClassVar[dict[str, Any]] = {"rank": 4, "deactivation": 0.0}

    rank: int = setting(16, "of the layers that matter", alias=("r",))
    scale: float = setting(1.0, "s", alias=("lora_alpha",))
    deactivation: float = setting(0.2, "p, probability that a layer rests in a pass",
                                    other=(0.5, 0.9))
    score: Literal["taylor", "fisher", "none"] = setting(
        "taylor", "what ranks follow", other=("none",))
    low: float = setting(0.9, "share of layers with half the rank", other=(0.0,))
    samples: int | None = setting(None, "samples to read at most; None: all there are",
                                  unseen="one sample more seldom reorders a few layers: "
                                  "tests/methods/test_ce_ssl.py", least=1)
    seed: int = setting(0, "of the draws", beside={"deactivation": 0.5})

    def __post_init__(self) -> None:
        check_dropout("ce_ssl", self.deactivation, "deactivation")
        if not 0 <= self.low <= 1 or self.rank < 1:
            raise RecipeError(f"{self}: expected low from 0 to 1 and a rank of 1 or more")
        given = sorted({"low", "samples"} & self.changed().keys())
        if self.score == "none" and given:
            raise RecipeError(f"ce_ssl: {' and '.join(given)} say how ranks follow data, which "
                              "score='none' does not read; expected score='taylor' or 'fisher', or "
                              f"{' and '.join(given)} left out")

    def observe(self, place: Place) -> FactorGradient | None:
        place.check_rank(self.rank, "ce_ssl")
        if self.score == "none":
            return None
        rng = torch.Generator().manual_seed(fold("ce_ssl", self.seed, place.name))
        A = 0.02 * torch.randn(self.rank, place.inp, generator=rng)
        return FactorGradient(A, self.scale, self.score == "taylor")

    def settle(self, seen: Mapping[Place, Any]) -> Mapping[Place, dict[str, Any]]:
        """Half the rank to the share `low` that matters least; of equal ones to the earlier."""
        order = sorted(seen, key=lambda p: seen[p].value)
        half = set(order[:round(self.low * len(order))])
        return {p: {"rank": max(1, self.rank // 4 * 2) if p in half else self.rank} for p in seen}

    def delta(self, site: Site) -> Thinned:
        site.place.check_rank(self.rank, "ce_ssl")
        return Thinned(site.place, site.settled.get("rank", self.rank), self.scale,
                       self.deactivation)

    def controller(self, tuned: Tuned) -> Rests | None:
        return Rests(self, tuned) if self.deactivation else None

    def per_token(self, place: Place, rank: int | None = None) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank if rank is None else rank

    def count(self, place: Place, rank: int | None = None) -> int:
        """Trainable parameters on one matrix of this rank."""
        return (self.rank if rank is None else rank) * (place.out + place.inp)


class Rests:
    """Who rests in a pass: drawn from the seed, the update and the pass's number within it."""

    def __init__(self, method: CeSsl, tuned: Tuned):
        self.method, self.model, self.at, self.whole = method, tuned.model, (-1, 0), False
        paths = {p.name: p.path for p in tuned.anatomy.places}
        self.layers: dict[str, list[torch.nn.Parameter]] = {}
        for name, term in tuned.terms(Thinned):
            self.layers.setdefault(paths[name.partition("[")[0]], []).extend(term.parameters())

    def drawn(self, update: int, nth: int) -> list[str]:
        """Paths of the layers that rest."""
        rng = random.Random(fold("ce_ssl rests", self.method.seed, update, nth))
        return [p for p in self.layers if rng.random() < self.method.deactivation]

    def around_step(self, step: Pass) -> Iterator[None]:
        update, nth = self.at
        self.at = (step.index, nth + 1 if update == step.index else 0)
        awake = self.whole or not self.model.training       # the mean answers in evaluation mode
        off = [] if awake else self.drawn(*self.at)
        last = off[-1:] if len(off) == len(self.layers) else []     # so that the loss has a graph
        with step.damped(off[:len(off) - len(last)], 0.0), step.damped(last, NOTHING):
            yield
        for p in (p for path in off for p in self.layers[path]):
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)

    def rehearse(self, step: int) -> None:
        self.whole = True                            # nobody rests: the dearest there is

    def step_end(self, step: int) -> None:
        self.whole = False
