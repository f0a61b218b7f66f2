from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch

from ...blocks.choose.cocktail import Cocktail, without
from ...blocks.choose.mixtures import Surface, best, drawn, fitted
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import untargeted


@dataclass(frozen=True)
class Found:
    """names: of the data sets.  tried: (shares, figure) of every proxy.  shares: the mixture that
    is foretold to be best, with `foretold`; measured: what a proxy on it came to.  surface: the
    fit."""

    names: tuple[str, ...]
    tried: list[tuple[dict[str, float], float]]
    shares: dict[str, float]
    foretold: float
    measured: float
    surface: Surface

    @property
    def chosen(self) -> dict[str, float]:
        """The mixture to take: the foretold one where its proxy holds up, else the best tried."""
        shares, figure = max(self.tried, key=lambda t: t[1])
        return self.shares if self.measured >= figure else shares

    def __str__(self) -> str:
        head = "  ".join([*(f"{n:>10}" for n in self.names), f"{'figure':>9}"])
        lines = ["  ".join([*(f"{w[n]:>10.3f}" for n in self.names), f"{y:>9.4f}"])
                 for w, y in [*self.tried, (self.shares, self.measured)]]
        return "\n".join([head, *lines, f"the last was foretold {self.foretold:.4f} (others are "
                                        f"foretold to {self.surface.error:.4f})"])


@dataclass(frozen=True, kw_only=True)
class Damo(Method):
    """DaMo: which shares of several data sets to train on, foretold from small runs.

        y(w) = m + sum_i b_i w_i + sum_{i<j} b_ij w_i w_j,      w* = argmax over the simplex of y

    A few *proxies* are trained, each on `count` rows drawn by shares w, and judged by a figure on
    held-out rows; y is fitted to them (blocks/choose/mixtures.py), and a last proxy is trained on
    w*, so that what was foretold stands beside what it came to::

        found = burnish.parse("damo(trials=10)")[0].lifecycle(data, train, score, held=held,
                                                               count=500)
        rows = method.rows(data, 10_000, found.chosen)            # the mixture, for burnish.fit

    The first proxies are all sets alike and each alone. Where sets help each other, or hurt, degree
    2 sees it; of S sets it has S (S + 1) / 2 numbers, so it wants about as many proxies. Not for
    proxies whose figure differs more by the seed than by the mixture: look at ``surface.error``.

    Rows that stand among the held-out ones are left out. Departure: the authors' predictor is an
    MLP of shares and steps, fitted to dozens of checkpoints of large runs; a quadratic has a
    closed form and an error that few proxies can tell (unconfirmed beside theirs).
    """

    paper: ClassVar[str] = ("DaMo: Data Mixing Optimizer in Fine-tuning Multimodal LLMs for Mobile "
                            "Phone Agents (2025), arXiv:2510.19336")

    trials: int = setting(12, "mixtures that are tried before one is foretold")
    degree: int = setting(2, "of y: 1 leaves the products out")
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        if self.trials < 3 or self.degree not in (1, 2):
            raise ConfigError("damo: trials of at least 3 and a degree of 1 or 2 are expected, "
                              f"got {self.trials} and {self.degree}")
        untargeted(self, "it chooses data")

    def rows(self, data: Mapping[str, Sequence[Any]], count: int, weights: Mapping[str, float]
             ) -> list[Any]:
        """So many rows, drawn by these shares, a set's own in shuffled passes."""
        stream = Cocktail({k: len(v) for k, v in data.items()}, weights, self.seed)
        return [data[name][i] for name, i in islice(stream, count)]

    def lifecycle(self, data: Mapping[str, Sequence[Any]], train: Callable[[list[Any]], Any],
                  score: Callable[[Any, Sequence[Any]], float], *, held: Sequence[Any],
                  count: int) -> Found:
        """Try, fit, foretell, and try what was foretold.

        train(rows) -> a model tuned on them, from the same start each time.  score(model, held) ->
        its figure, higher is better.
        """
        if len(data) < 2 or count < 1:
            raise ConfigError("damo mixes two data sets or more, and trials of a row or more; got "
                              f"{len(data)} and count={count}")
        clean = {name: without(rows, list(held)) for name, rows in data.items()}
        if empty := [n for n, rows in clean.items() if not rows]:
            raise ConfigError(f"damo: every row of {empty[0]!r} is held out, or it has none")
        names = tuple(data)

        def came_to(w: torch.Tensor) -> tuple[dict[str, float], float]:
            share = dict(zip(names, w.tolist(), strict=True))
            return share, float(score(train(self.rows(clean, count, share)), held))

        W = drawn(len(names), self.trials, self.seed)
        tried = [came_to(w) for w in W]
        surface = fitted(W, [y for _, y in tried], self.degree)
        w = best(surface, len(names), self.seed)
        shares, measured = came_to(w)
        return Found(names, tried, shares, float(surface(w[None])[0]), measured, surface)
