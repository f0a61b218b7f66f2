from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.update.accountant import epsilon_of, sigma_for
from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ._private import EPSILON, TOLD, Private, PrivateSums

if TYPE_CHECKING:
    from ...core.protocols import Tuned

@dataclass(frozen=True, kw_only=True)
class Dp(PrivateSums):
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
    small: ClassVar[dict[str, Any]] = {"sigma": 0.01, "batch": 2.0}

    epsilon: float | None = setting(None, "what the run may spend; None: 8, or what sigma spends",
                                    other=(4.0,), beside={"sigma": None}, unseen=TOLD)
    accountant: Literal["pld", "rdp", "edgeworth"] = setting(
        "pld", "how epsilon is computed; edgeworth approximates, of a given sigma", unseen=TOLD,
        beside={"sigma": 0.01})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accountant == "edgeworth" and self.sigma is None:
            raise RecipeError("dp: edgeworth approximates and bounds nothing, so it plans no "
                              "noise: give sigma=, or accountant='pld'")

    def hand(self, tuned: Tuned) -> Planned:
        return Planned(self, tuned)


class Planned(Private):
    """One noise for all updates, which are counted."""

    method: Dp

    def _plan(self) -> None:
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
        self.over()

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
