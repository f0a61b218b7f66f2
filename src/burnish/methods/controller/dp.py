from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ...blocks.update.accountant import epsilon_of, sigma_for
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
class Dp(Method):
    """DP-SGD: what trains says little of any single sample.

        g = (sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2)) / B     per update, g_i of sample i

    ||g_i|| is over all that trains, C = `max_norm`, B the expected number of samples. Fit draws
    each row with chance B / records (Poisson; an update without any adds noise all the same) and
    sigma is the least with which the planned updates spend (epsilon, delta); another loop draws so
    itself and says `records`, `batch` and ``tuned.total_steps``. More updates than planned are
    refused. run.json says what was spent.

    Beside anything that trains: ``norms + dp`` is few-shot FiLM under DP (DP-SGD as published with
    `sgd`; any rule may follow, it sees g alone). Start: the pre-trained function. A pass per
    sample, exact whatever trains (tensors used twice, functions of W, branches): activations of
    one sample at a time, and of what trains one sum more. An objective is part of each sample's
    loss.

    Refused: norms over a batch's samples, losses that a sample does not have alone, passes that
    look first (sam), data read beforehand in fit, stages, a loss scale, several processes. What is
    protected is a row (of running text: a block). Not covered: logged training losses, a choice of
    settings by further runs, and noise that is drawn again by whoever knows the seed.
    """

    paper: ClassVar[str] = ("Deep Learning with Differential Privacy (2016), arXiv:1607.00133; On "
                            "the Efficacy of Differentially Private Few-shot Image Classification "
                            "(2023), arXiv:2302.01190")
    tier: ClassVar[str] = "checked against an independent equation"
    exact: ClassVar[bool] = False
    private: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"own loss", "own norms"})
    relies_on: ClassVar[tuple[str, ...]] = ("around_step", "gradients")
    denies: ClassVar[dict[str, str]] = {
        "around_step": "only sums with noise may be looked at"}
    small: ClassVar[dict[str, Any]] = {"sigma": 0.01, "batch": 2.0}

    epsilon: float | None = setting(None, "what the run may spend; None: 8, or what sigma spends",
                                    other=(4.0,), beside={"sigma": None}, unseen=TOLD)
    risk: float | None = setting(None, "delta of (epsilon, delta); None: 1 / records",
                                 alias=("delta",), other=(1e-6,), unseen=TOLD)
    sigma: float | None = setting(None, "noise in units of max_norm; None: what epsilon asks for",
                                  alias=("noise_multiplier",), other=(0.5,))
    max_norm: float = setting(1.0, "C, largest norm of a sample's gradient", other=(0.01,))
    records: int | None = setting(None, "samples there are; None: as fit says", other=(100,),
                               unseen=TOLD)
    batch: float | None = setting(None, "B, expected of an update; None: as fit says", other=(3.0,))
    accountant: Literal["pld", "rdp", "edgeworth"] = setting(
        "pld", "how epsilon is computed; edgeworth approximates, of a given sigma", unseen=TOLD,
        beside={"sigma": 0.01})

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.sigma is not None:
            raise RecipeError("dp: sigma says how much is spent, and so does epsilon: give one")
        if self.accountant == "edgeworth" and self.sigma is None:
            raise RecipeError("dp: edgeworth approximates and bounds nothing, so it plans no "
                              "noise: give sigma=, or accountant='pld'")
        for name in ("epsilon", "sigma", "max_norm", "records", "batch"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise RecipeError(f"dp: {name} is positive, got {value}")
        if self.risk is not None and not 0 < self.risk < 1:
            raise RecipeError(f"dp: delta is between 0 and 1, got {self.risk}")
        if self.records is not None and self.batch is not None:
            Sampling(self.records, self.batch)

    def claims(self) -> tuple[str, ...]:
        return ("what a sample may say",)

    def forbids(self) -> dict[str, str]:
        return {"the stages of the run": "dp counts what one stretch of updates spends, and stages "
                                         "would each spend it again"}

    def controller(self, tuned: Tuned) -> Private:
        if processes() > 1:
            raise ConfigError("dp draws its samples and its noise in one process, and here are "
                              "several; use one")
        return Private(self, tuned)


class Private:
    """First of all, so that whoever looks at gradients sees those with noise."""

    phase: ClassVar[int] = 0

    def __init__(self, method: Dp, tuned: Tuned):
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
                raise ConfigError(f"dp: {name}={mine:g}, and this run draws by {fits:g}; leave "
                                  f"{name} to it")
        return said

    def rehearse(self, step: int) -> None:
        self.rehearsing = True                       # spends nothing, and needs no plan

    def around_step(self, step: Pass) -> Iterator[None]:
        for path, module in self.tuned.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and \
                    (module.training or module.running_mean is None):
                raise ConfigError(f"dp: {path} normalises over the samples of a batch, which "
                                  "leaves none a gradient of its own; put it in evaluation mode, "
                                  "or take a model with GroupNorm or LayerNorm")
        if float(step.scale) > 1:
            raise ConfigError("dp counts gradients in their own size, and the loss has a scale of "
                              f"{float(step.scale):g}; train in bf16 or fp32")
        self._plan()
        with Clipped(step.parameters().values(), self.method.max_norm) as sums:
            step.apart(sums.take)
            yield

    def _plan(self) -> None:
        """The noise, before the first pass; and is there anything left to spend?"""
        if self.rehearsing:
            return
        m, total, at = self.method, self.tuned.total_steps, self.sampling
        if m.batch is None and at is None:
            raise ConfigError("dp: how many samples is an update expected to draw? Give batch= "
                              "(each drawn with chance batch / records), or use burnish.fit")
        if self.sigma is None:
            if at is None or total is None:
                raise ConfigError("dp: the noise for an epsilon depends on records=, batch= and "
                                  "the number of updates (tuned.total_steps = ...), which "
                                  "burnish.fit says; give them, or sigma=")
            self.planned = total
            self.sigma = sigma_for(m.epsilon or EPSILON, at.rate, total, self.delta(at),
                                   m.accountant)
        if self.planned is not None and self.spent >= self.planned:
            raise ConfigError(f"dp: the {self.planned} updates that the noise was made for have "
                              "been made, and what they may spend is spent; plan for more from the "
                              "beginning")

    def delta(self, at: Sampling) -> float:
        """The chance that more is told than epsilon says."""
        if self.method.risk is None and at.rows < 2:
            raise ConfigError("dp: delta is 1 / records, which takes more than one; give delta=")
        return self.method.risk or 1 / at.rows

    def before_update(self, step: int) -> None:
        sigma = 1.0 if self.sigma is None else self.sigma
        batch = self.method.batch or (self.sampling.batch if self.sampling else 1.0)
        hide([p for _, p in self.tuned.named_parameters()], sigma * self.method.max_norm, batch)
        self.spent += not self.rehearsing
        self.rehearsing = False

    def told(self) -> Mapping[str, Any]:
        """What has been spent so far."""
        said: dict[str, Any] = {"sigma": self.sigma, "max_norm": self.method.max_norm,
                                "updates": self.spent}
        if self.sampling is not None and self.sigma is not None:
            delta = self.delta(self.sampling)
            said |= {"epsilon": epsilon_of(self.sigma, self.sampling.rate, self.spent, delta,
                                           self.method.accountant),
                     "delta": delta, "rate": self.sampling.rate,
                     "accountant": self.method.accountant}
            if self.method.accountant == "edgeworth":            # and what is certain
                said["bound"] = epsilon_of(self.sigma, self.sampling.rate, self.spent, delta, "pld")
        return said

    def state_dict(self) -> Mapping[str, Any]:
        return {"sigma": self.sigma, "planned": self.planned, "spent": self.spent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sigma, self.planned, self.spent = state["sigma"], state["planned"], state["spent"]
