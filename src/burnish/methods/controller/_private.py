"""What DP-SGD and its kin share: sums of samples' gradients in which no sample counts much, and
their noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...blocks.update.private import Clipped, hide
from ...core.errors import ConfigError, RecipeError
from ...core.method import Method, setting
from ...core.processes import processes
from ...core.sampling import Sampling

if TYPE_CHECKING:
    from ...core.protocols import Pass, Tuned

#: spent by a run where neither epsilon nor sigma is given
EPSILON = 8.0
TOLD = "only what the run is said to have spent changes: tests/methods/test_dp.py"


@dataclass(frozen=True, kw_only=True)
class PrivateSums(Method):
    """The settings of the sum and of how samples are drawn."""

    exact: ClassVar[bool] = False
    private: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"own loss", "own norms"})
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "gradients")
    denies: ClassVar[dict[str, str]] = {
        "around_step": "only sums with noise may be looked at"}

    risk: float | None = setting(None, "delta of (epsilon, delta); None: 1 / records",
                                 alias=("delta",), other=(1e-6,), unseen=TOLD)
    sigma: float | None = setting(None, "noise in units of max_norm; None: what epsilon asks for",
                                  alias=("noise_multiplier",), other=(0.5,))
    max_norm: float = setting(1.0, "C, largest norm of a sample's gradient", other=(0.01,))
    records: int | None = setting(None, "samples there are; None: as fit says", other=(100,),
                               unseen=TOLD)
    batch: float | None = setting(None, "B, expected of an update; None: as fit says", other=(3.0,))

    def __post_init__(self) -> None:
        for name in ("epsilon", "sigma", "max_norm", "records", "batch"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise RecipeError(f"{self.name}: {name} is positive, got {value}")
        if self.sigma is not None and self.epsilon is not None:
            raise RecipeError(f"{self.name}: sigma says how much is spent, and so does epsilon: "
                              "give one")
        if self.risk is not None and not 0 < self.risk < 1:
            raise RecipeError(f"{self.name}: delta is between 0 and 1, got {self.risk}")
        if self.records is not None and self.batch is not None:
            Sampling(self.records, self.batch)

    def claims(self) -> tuple[str, ...]:
        return ("what a sample may say",)

    def forbids(self) -> dict[str, str]:
        return {"the stages of the run": f"{self.name} counts what one stretch of updates spends, "
                                         "and stages would each spend it again"}

    def controller(self, tuned: Tuned) -> Private:
        if processes() > 1:
            raise ConfigError(f"{self.name} draws its samples and its noise in one process, and "
                              "here are several; use one")
        return self.hand(tuned)

    def hand(self, tuned: Tuned) -> Private:
        """What acts while it trains."""
        raise NotImplementedError


class Private:
    """First of all, so that whoever looks at gradients sees those with noise."""

    phase: ClassVar[int] = 0

    def __init__(self, method: Any, tuned: Tuned):
        self.method, self.tuned = method, tuned
        self.sampling = self._sampling()
        self.sigma: float | None = method.sigma
        self.planned: int | None = None              # updates that the noise is made for
        self.spent = 0                               # updates made
        self.rehearsing = False

    def _sampling(self) -> Sampling | None:
        said, m = self.tuned.sampling, self.method
        if said is None:
            return None if m.records is None or m.batch is None else Sampling(m.records, m.batch)
        for name, mine, fits in (("records", m.records, said.rows), ("batch", m.batch, said.batch)):
            if mine not in (None, fits):
                raise ConfigError(f"{m.name}: {name}={mine:g}, and this run draws by {fits:g}; "
                                  f"leave {name} to it")
        return said

    def rehearse(self, step: int) -> None:
        self.rehearsing = True                       # spends nothing, and needs no plan

    def around_step(self, step: Pass) -> Iterator[None]:
        for path, module in self.tuned.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and \
                    (module.training or module.running_mean is None):
                raise ConfigError(f"{self.method.name}: {path} normalises over the samples of a "
                                  "batch, which leaves none a gradient of its own; put it in "
                                  "evaluation mode, or take a model with GroupNorm or LayerNorm")
        if float(step.scale) > 1:
            raise ConfigError(f"{self.method.name} counts gradients in their own size, and the "
                              f"loss has a scale of {float(step.scale):g}; train in bf16 or fp32")
        self._plan()
        with self.clipped(step.parameters()) as sums:
            step.apart(sums.take)
            yield

    def clipped(self, trains: Mapping[str, nn.Parameter]) -> Clipped:
        """What no sample counts for much in."""
        return Clipped(trains.values(), self.method.max_norm)

    def _plan(self) -> None:
        """The noise, before the first pass; and is there anything left to spend?"""
        raise NotImplementedError

    def over(self) -> None:
        """Raises ConfigError where all planned updates have been made."""
        if self.planned is not None and self.spent >= self.planned:
            raise ConfigError(f"{self.method.name}: the {self.planned} updates that the noise was "
                              "made for have been made, and what they may spend is spent; plan "
                              "for more from the beginning")

    def delta(self, at: Sampling) -> float:
        """The chance that more is told than epsilon says."""
        if self.method.risk is None and at.rows < 2:
            raise ConfigError(f"{self.method.name}: delta is 1 / records, which takes more than "
                              "one; give delta=")
        return self.method.risk or 1 / at.rows

    def before_update(self, step: int) -> None:
        sigma = 1.0 if self.sigma is None else self.sigma
        batch = self.method.batch or (self.sampling.batch if self.sampling else 1.0)
        hide([p for _, p in self.tuned.named_parameters()], sigma * self.method.max_norm, batch)
        self.spent += not self.rehearsing
        self.rehearsing = False

    def state_dict(self) -> Mapping[str, Any]:
        return {"sigma": self.sigma, "planned": self.planned, "spent": self.spent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sigma, self.planned, self.spent = state["sigma"], state["planned"], state["spent"]
