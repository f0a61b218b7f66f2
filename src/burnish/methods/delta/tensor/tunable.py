from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ....blocks.update.noise import fold
from ....blocks.weight.tunable import Tunable
from ....core.errors import ConfigError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

_KEPT = "drawn where part.step is called: tests/methods/test_tunable.py"


@dataclass(frozen=True, kw_only=True)
class TunableConvolutions(Method):
    """Tunable convolutions: one network for several objectives, weighed when it answers.

        W'(w) = W + s sum_i w_i B_i A_i       loss(w) = sum_i w_i L_i       s = alpha / rank

    w (p,) one coefficient for each of the p `objectives`, drawn anew for every update and set by
    hand when the network answers: what it was asked to weigh in training it weighs there. A_i
    (rank, in), B_i (out, rank) of each kernel (out, in / groups * k * k) or linear; ``rank=0``
    takes whole kernels, as published. ::

        part = burnish.parse("tunable(objectives=2)")[0]
        tuned = burnish.tune(net, part, targets="conv")
        for batch in batches:
            part.step(tuned, batch, [sharp, smooth])    # losses of (outputs, batch)
        with part.lifecycle(tuned, (0.2, 0.8)):
            net(x)

    ``among="simplex"``: w uniform among those that sum to 1; "cube": each from 0 to 1 by itself. In
    a loop that does not call ``part.step``, and wherever nobody sets it, w is `coefficients` (the
    same for all where nobody says).

    Start: B = 0 (K = 0), the pre-trained function under every w. Trains p rank (in + out) a matrix,
    p in out with rank=0. Kept for backward: x of linears, nothing of convolutions; the weight is
    made again. Merges exactly, at the coefficients that are set then.

    When to use: restoration and its like, where sharp and faithful pull apart and a person
    decides. When not: objectives that agree (one loss will do), or a coefficient for each sample of
    a batch: w is one for all of it.

    Departures: the pre-trained kernel stands beside the p that are combined (theirs are trained
    from nothing), biases stay, losses are weighed by w alone (scale them yourself). Unconfirmed:
    how w is drawn.
    """

    paper: ClassVar[str] = ("Tunable Convolutions with Parametric Multi-Loss Optimization, CVPR "
                            "2023, arXiv:2304.00898")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    objectives: int = setting(2, "p, losses that are weighed", other=(3,))
    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    coefficients: tuple[float, ...] | None = setting(
        None, "w where nobody sets it; None: the same for all", other=((0.9, 0.1),))
    among: Literal["simplex", "cube"] = setting("simplex", "among which w is drawn", unseen=_KEPT)
    seed: int = setting(0, "of the draws of w", unseen=_KEPT)

    def __post_init__(self) -> None:
        w = self.coefficients
        if self.objectives < 2 or self.rank < 0:
            raise RecipeError("tunable: objectives of at least 2 and a rank of 0 or more are "
                              f"expected, got {self.objectives} and {self.rank}")
        if not self.rank and "alpha" in self.changed():
            raise RecipeError("tunable: alpha does nothing beside rank=0, where kernels are whole")
        if w is not None:
            self.checked(w)

    def checked(self, w: Sequence[float]) -> Tensor:
        """Coefficients, as many as there are objectives and each of 0 or more. RecipeError."""
        found = torch.as_tensor(w, dtype=torch.float32).flatten()
        if len(found) != self.objectives or not bool((found >= 0).all()):
            raise RecipeError(f"tunable: {self.objectives} coefficients of 0 or more are expected, "
                              f"one for each objective, got {tuple(found.tolist())}")
        return found

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        n = self.objectives
        return {"omega": torch.full((n,), 1 / n) if self.coefficients is None else
                self.checked(self.coefficients)}

    def delta(self, site: Site) -> Tunable:
        if self.rank:
            site.place.check_rank(self.rank, "tunable")
        return Tunable(site.place, self.rank, self.alpha / self.rank if self.rank else 1.0,
                       site.shared)

    @contextmanager
    def lifecycle(self, tuned: Any, coefficients: Sequence[float]) -> Iterator[None]:
        """Inside, the network answers under these coefficients."""
        w, shared = self.checked(coefficients), self._shared(tuned)
        before = shared.omega.clone()
        shared.omega.copy_(w)
        try:
            yield
        finally:
            shared.omega.copy_(before)

    def step(self, tuned: Any, batch: Any, losses: Sequence[Callable[[Any, Any], Tensor]]
             ) -> Tensor:
        """One update under coefficients that are drawn for it: its loss."""
        if len(losses) != self.objectives:
            raise ConfigError(f"tunable: {self.objectives} losses are expected, one for each "
                              f"objective, got {len(losses)}")
        w = self.drawn(tuned.timeline.step if tuned.current_optimizer is not None else 0)
        with self.lifecycle(tuned, w.tolist()):
            value: Tensor = tuned.step(batch, loss=lambda out, b: torch.stack(
                [c * one(out, b) for c, one in zip(w.tolist(), losses, strict=True)]).sum())
        return value

    def drawn(self, step: int) -> Tensor:
        """The coefficients of an update."""
        g = torch.Generator().manual_seed(fold("tunable", self.seed, step))
        x = torch.rand(self.objectives, generator=g)
        if self.among == "cube":
            return x
        x = (1 - x).log()                                # exponentials, all but for their sign
        return x / x.sum()

    def _shared(self, tuned: Any) -> Any:
        term = next((t for _, t in tuned.terms(Tunable)), None)
        if term is None:
            raise ConfigError("tunable has no part in this model: tune with it first")
        return term.shared

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        one = self.rank * (place.inp + place.out) if self.rank else place.inp * place.out
        return self.objectives * one
