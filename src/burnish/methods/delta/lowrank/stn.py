from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ....blocks.update.tuning import Tuning
from ....blocks.weight.responding import Responding
from ....core.errors import ConfigError, RecipeError
from ....core.method import Method, setting
from ....core.processes import processes
from ....core.site import Place, Site
from .lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Stn(Method):
    """Self-Tuning Networks: LoRA that learns how it would answer under other hyperparameters, and
    so moves its own dropout and weight decay down the validation loss while it trains.

        W'(u) = W + s (B + diag(V u) R) A,   s = alpha / rank        the structured best response
        training:   min over A, B, R, V of  L_T(W'(u + e)) + decay(u + e)/2 (|A|^2 + |B + ..|^2)
        validation: min over u, sigma of    L_V(W'(u + e)) - widening sum log sigma
        e ~ N(0, diag(sigma^2)),  dropout = sigmoid(.),  decay = exp(.)

    A (rank, in), B and R (out, rank), V (out, 2); u (2,) the hyperparameters without bounds, from
    where they began, one vector for all places: dropout on the input of A, and decay, of which one
    that begins at 0 stays there (e and u are 0). A step on u follows every `turn` updates; nothing
    of the training loss is differentiated in u. `burnish fit` gives the validation rows, in batches
    of the training's size; a loop of one's own ``part.lifecycle(tuned, batches)``. A run tells
    where they went (``stn``).

    Start: B = R = 0, the pre-trained function exactly. Trains rank (in + 2 out) + 2 out per matrix;
    u and sigma are in the file beside them. Kept for backward: x, rank per token. Merges exactly,
    at u; leaves for others as plain LoRA. A forward and backward more every `turn` updates.

    When to use: validation rows of some hundreds, and nobody to search dropout and decay. When not:
    those rows are to say how good the run is (they have been learnt from, if by two numbers), or
    there are few of them. One process.

    Departures: e is drawn once an update, not once a sample; biases do not respond, LoRA has none;
    u is measured from its start. Unconfirmed: sigma's start, `widening` and the rate of u.
    """

    paper: ClassVar[str] = ("Self-Tuning Networks: Bilevel Optimization of Hyperparameters using "
                            "Structured Best-Response Functions, ICLR 2019, arXiv:1903.03088")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "gradients")
    holds_out: ClassVar[bool] = True
    excused: ClassVar[Mapping[str, str]] = {
        "every_tensor_has_a_gradient": "R and V answer to what u is moved by, which an optimizer's "
                                       "run does: tests/methods/test_stn.py"}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    dropout: float = setting(0.05, "dropout on the input of A, where it begins; 0: none, ever")
    decay_start: float = setting(1e-4, "weight decay of the update, where it begins; 0: none, ever")
    spread: float = setting(0.5, "sigma at the start")
    widening: float = setting(1e-3, "tau, weight of sigma's entropy", unseen=
                              "acts on validation rows: tests/methods/test_stn.py")
    tuning_rate: float = setting(0.01, "of the steps on u and sigma", unseen=
                                 "acts on validation rows: tests/methods/test_stn.py")
    turn: int = setting(2, "updates between two steps on u", unseen=
                        "acts on validation rows: tests/methods/test_stn.py")
    seed: int = setting(0, "of what u is moved by")

    def __post_init__(self) -> None:
        check_dropout("stn", self.dropout)
        if min(self.dropout, self.decay_start) < 0 or not any(self.tuned):
            raise RecipeError("stn: a dropout or a decay_start above 0 is expected, for there is "
                              "nothing to tune else")
        if min(self.spread, self.tuning_rate) <= 0 or self.widening < 0 or self.turn < 1:
            raise RecipeError("stn: spread and tuning_rate above 0, widening of 0 or more and turn "
                              f"of at least 1 are expected, got {self.spread}, {self.tuning_rate}, "
                              f"{self.widening} and {self.turn}")

    @property
    def tuned(self) -> tuple[bool, bool]:
        """Of dropout and decay, which are tuned."""
        return self.dropout > 0, self.decay_start > 0

    def values(self, u: Tensor) -> dict[str, float]:
        """Dropout and decay under u."""
        less, more = (1.0, 1.0) if isinstance(u, FakeTensor) else \
            torch.stack([-u[0], u[1]]).detach().double().exp().tolist()
        p = self.dropout and self.dropout / (self.dropout + (1 - self.dropout) * less)
        return {"dropout": p, "decay": self.decay_start and self.decay_start * more}

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        return {"u": nn.Parameter(torch.zeros(2), requires_grad=False),
                "log_sigma": nn.Parameter(torch.full((2,), math.log(self.spread)),
                                          requires_grad=False)}

    def delta(self, site: Site) -> Responding:
        site.place.check_rank(self.rank, "stn")
        site.shared.drop = self.dropout
        return Responding(site.place, self.rank, self.alpha / self.rank, site.shared)

    def controller(self, tuned: Any) -> Tuning:
        if processes() > 1:
            raise ConfigError("stn steps its hyperparameters by the validation rows of one process,"
                              f" and this run has {processes()}")
        return Tuning(self, tuned, [t for _, t in tuned.terms(Responding)])

    def lifecycle(self, tuned: Any, batches: Sequence[Any],
                  loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        """Gives a tuned model, whose optimizer is made, the validation batches of its run."""
        if not len(batches):
            raise ConfigError("stn: no validation batches")
        handler = next((h for _, h in getattr(tuned.timeline, "handlers", ())
                        if isinstance(h, Tuning)), None)
        if handler is None:
            raise ConfigError("stn has no part in this run: tune with it, and call "
                              "tuned.optimizer() first")
        handler.hears(lambda k: (batches[k % len(batches)], loss))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.inp + 2 * place.out) + 2 * place.out
