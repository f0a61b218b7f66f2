from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.choose.reach import costs, relieved, within
from ...blocks.update.live import TrainableSchedule
from ...core.errors import ConfigError, RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ...core.processes import processes
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Pass, Tuned


@dataclass(frozen=True, kw_only=True)
class Greentrainer(Method):
    """GreenTrainer: every so often, the tensors most worth their share of backward are chosen.

        max sum_k m_k I_k      while  sum_k (max_{j >= k} m_j) t_dy[k] + m_k t_dw[k] <= rho_bp T_bp
        I_k = -<g1_k, dw_k>    rho_bp = max(.05, rho (1 + T_fp / T_bp) - T_fp / T_bp)

    k counts from the output; t_dw[k] are the FLOPs of a tensor's own gradient, t_dy[k] those that
    bring the gradient to it, T_fp and T_bp those of a whole forward and backward. dw is what one
    update would change, g1 the gradient after it: the loss that training this tensor takes away.
    Solved by dynamic programming (blocks/choose/reach.py); the budget is met.

    Start: the pre-trained function. What may train is everything (adapters beside it, too);
    at a time the chosen tensors do, the rest has no gradient and no optimizer state, and backward
    ends at the deepest. A choice takes a forward, two passes and an update of the micro-batch,
    looked at and undone: a copy of the weights on the host, all gradients once, the optimizer state
    of one tensor at a time; weights, moments and random numbers are then as before. It is promised
    as a part of the step: which tensors are chosen depends on values, so simulation and
    measurement take the choice of most entries.

    Departures: state of a tensor that leaves is dropped (the authors' code keeps it, and leaves
    two ghost steps in it); costs are not rounded down to a grid; updates are counted, not epochs.
    One process: others would choose otherwise.
    """

    paper: ClassVar[str] = ("Towards Green AI in Fine-tuning Large Language Models via Adaptive "
                            "Backpropagation, ICLR 2024")
    tier: ClassVar[str] = "checked against an independent equation"
    excused: ClassVar[dict[str, str]] = {
        "exactly_what_trains_moves":
            "what is never worth its share of backward is never chosen; "
            "tests/methods/test_greentrainer.py shows that exactly what is chosen moves"}
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "schedule")

    budget: float = setting(0.5, "rho, share of the FLOPs of a full step, in (0, 1]")
    every: int = setting(100, "updates between choices; published: an epoch")

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1 or self.every < 1:
            raise RecipeError("greentrainer: budget is in (0, 1] and every at least 1, got "
                              f"{self.budget} and {self.every}")

    def claims(self) -> tuple[str, ...]:
        return ("the schedule of live blocks",)

    def repeats(self) -> int | None:
        return None

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for name, p in anatomy.model.named_parameters():
            if p.is_floating_point() and ".burnish." not in f".{name}":
                yield Selection(name)

    def controller(self, tuned: Tuned) -> Chosen:
        if processes() > 1:
            raise ConfigError("greentrainer chooses from what one process sees, and here are "
                              "several, which would train different tensors; use one process")
        return Chosen(self, tuned)


class Chosen:
    """Early, so that other handlers see what is live."""

    phase: ClassVar[int] = EARLY

    def __init__(self, method: Greentrainer, tuned: Tuned):
        self.method, self.model = method, tuned.model
        self.tensors = dict(tuned.named_parameters())
        self.schedule = TrainableSchedule({n: [p] for n, p in self.tensors.items()},
                                          lambda step: None, optimizer=lambda:
                                          tuned.current_optimizer)
        self.at: int | None = None                   # the update of the last choice
        self.largest = False                         # choose what takes most memory

    def rehearse(self, step: int) -> None:
        self.at, self.largest = None, True

    def around_step(self, step: Pass) -> Iterator[None]:
        if self.at is None or step.index - self.at >= self.method.every:
            self.at = step.index
            self.schedule.set(self.tensors)
            self.schedule.set(self.choose(step))
        yield

    def choose(self, step: Pass) -> frozenset[str]:
        listed, T_fp = costs(self.model, self.tensors, lambda: step.probe(grads=False))
        T_bp = sum(c.way + c.own for c in listed)
        rho = self.method.budget
        share = max(0.05, rho * (1 + T_fp / T_bp) - T_fp / T_bp)
        worth = relieved(step, self.tensors)
        if self.largest:
            worth = {n: float(p.numel()) for n, p in self.tensors.items()}
            self.largest = False
        return within(listed, worth, share * T_bp)

    def state_dict(self) -> Mapping[str, Any]:
        return {**self.schedule.state_dict(), "at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at, self.largest = state["at"], False
        self.schedule.load_state_dict(state)
