from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...blocks.choose.pruned import Pruned, PrunedRuns
from ...core.anatomy import Anatomy
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.targets import match


@dataclass(frozen=True)
class Curve:
    """Quality over the share of entries that are zero: `points` (s, P(s)), s rising from 0.

    sizes: of each point, the magnitude below which all are zero; empty where no one size says it.
    """

    points: list[tuple[float, float]]
    drop: float
    sizes: list[float] = field(default_factory=list)

    @property
    def essential(self) -> float:
        """The largest s with ``P(s) >= P(0) - drop |P(0)|``."""
        _, whole = self.points[0]
        return max(s for s, p in self.points if p >= whole - self.drop * abs(whole))

    @property
    def size(self) -> float | None:
        """The magnitude below which all are zero at `essential`."""
        at = [s for s, _ in self.points].index(self.essential)
        return self.sizes[at] if self.sizes else None

    @property
    def knee(self) -> float:
        """The s whose point lies farthest above the chord from the first to the last, both axes
        scaled to 1; the first of equals, and 0 where none lies above it."""
        (_, whole), (last, least) = self.points[0], self.points[-1]
        if least == whole:
            return 0.0

        def above(s: float, p: float) -> float:      # but for what is the same for all points
            return p / abs(least - whole) - s / last * (1 if least > whole else -1)

        return max(self.points, key=lambda point: (above(*point), -point[0]))[0]


@dataclass(frozen=True, kw_only=True)
class EssentialSparsity(Method):
    """Essential sparsity: how many of a model's smallest weights can be zero at no loss.

    For every s of `grid` the share s of entries with the smallest |W| is zero, with no training
    in between, and the model is scored: P(s). Reported are the largest s with ``P(s) >= P(0) - drop
    |P(0)|`` and the knee of the curve (the point farthest above its chord). `targets` narrows what
    is pruned; by default the linear weights of the blocks, never embeddings, norms and heads.
    ranking="layer" takes the same share of each weight; order="random" is the control.

    With `runs` = m the patterns (m - 1):m, ..., 1:m take the place of the grid: of every m inputs
    in a row the smallest are zero.

    Trains nothing: a diagnosis, which `suggests` settings to other methods. Masks are nested.
    Memory: the entries that are out, with their positions; afterwards every bit is where it was.
    To tune before scoring, with the zeros held, as the paper does for pre-trained checkpoints, let
    `score` do so on a copy. (`essential` and the knee are this library's definitions of what the
    paper shows as a bend.) ``burnish sparsity`` is its command.
    """

    paper = ("The Emergence of Essential Sparsity in Large Pre-trained Models (2023), "
             "arXiv:2306.03805")
    tier = "checked against an independent equation"

    grid: tuple[float, ...] | list[float] = setting(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), "shares that are pruned, beside none")
    drop: float = setting(0.01, "share of P(0) that may be lost")
    ranking: Literal["global", "layer"] = setting("global", "magnitudes against all, or in a layer")
    order: Literal["magnitude", "random"] = setting("magnitude", "what goes first")
    seed: int = setting(0, "of the random order")
    runs: int = setting(0, "m of n:m, inputs in a row of which fewer and fewer stay; 0: no runs")

    def __post_init__(self) -> None:
        grid = list(self.grid) if isinstance(self.grid, tuple | list) else []
        if not grid or grid != sorted(set(grid)) or not all(0 < s < 1 for s in grid):
            raise ConfigError(f"essential_sparsity: grid={self.grid!r}: expected rising shares "
                              "between 0 and 1")
        if not self.drop >= 0:
            raise ConfigError(f"essential_sparsity: drop={self.drop}: expected at least 0")
        if self.seed and self.order != "random":
            raise ConfigError("essential_sparsity: seed does nothing beside order='magnitude'")

        if self.runs < 0 or self.runs == 1:
            raise ConfigError(f"essential_sparsity: runs={self.runs}: expected 2 inputs or more, "
                              "or 0 for none")
        if idle := [n for n in ("grid", "ranking") if self.runs and n in self.changed()]:
            raise ConfigError(f"essential_sparsity: {idle[0]} does nothing beside "
                              f"runs={self.runs}, whose patterns say what goes")

    def lifecycle(self, model: nn.Module, *, score: Callable[[nn.Module], float]) -> Curve:
        """The curve. score: quality of the model as it stands, higher is better."""
        weights = self._weights(model)
        points, sizes = [(0.0, float(score(model)))], [0.0]
        seed = self.seed if self.order == "random" else None
        if self.runs:
            with torch.no_grad(), PrunedRuns(weights, self.runs, seed) as runs:
                for n in range(self.runs - 1, 0, -1):
                    points.append((runs.to(n), float(score(model))))
            return Curve(points, self.drop)
        with torch.no_grad(), Pruned(weights, self.ranking == "global", seed) as pruned:
            for s in self.grid:
                points.append((pruned.to(s), float(score(model))))
                sizes.append(pruned.size)
        told = self.ranking == "global" and seed is None
        return Curve(points, self.drop, sizes if told else [])

    def suggests(self, curve: Curve) -> list[str]:
        """Recipes that leave alone, or take out, what the model can spare."""
        s = curve.essential
        if not s or self.order == "random":
            return []
        if self.runs:
            return [f"magnitude(mask='{round(self.runs * (1 - s))}:{self.runs}') + dsee"]
        size = [] if curve.size is None else [f"sara(tau={curve.size:.3g})"]
        return [*size, f"snell(s={s:.3g})", f"pst(ratio={s:.3g})",
                f"magnitude(ratio={s:.3g}, mask='matrix') + dsee"]

    def _weights(self, model: nn.Module) -> Sequence[Tensor]:
        """The weights as they are stored; with `runs` as (out, in) views of them."""
        places = [p for p in match(Anatomy.of(model), self.targets) if p.kind != "embedding"]
        found = {id(w): (p, w) for p in places for w in [p.stored(model.get_submodule(p.path))]}
        if any(p.rows for p in places) or not found:
            raise ConfigError("essential_sparsity prunes whole weights: name them whole, and some")
        for p, _ in found.values():
            if self.runs and p.inp % self.runs:
                raise ConfigError(f"essential_sparsity: runs of {self.runs} inputs do not tile "
                                  f"{p.name}, which has {p.inp}; leave it out of targets")
        return [p.view(w.detach()) if self.runs else w for p, w in found.values()]
