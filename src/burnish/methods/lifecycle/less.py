from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...blocks.choose.influence import adam_direction, projected
from ...blocks.state.taps import evaluating
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.processes import assign
from ._adapted import untargeted
from ._choosing import Chooses


@dataclass(frozen=True)
class Point:
    """Where a warm-up stood: its tensors and Adam's moments, read when they are asked for.

    rate: mean learning rate of the updates before it.  read: -> (tensors by name, moments by name
    of what trains: exp_avg, exp_avg_sq, step).
    """

    rate: float
    read: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Mapping[str, Any]]]]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Less(Chooses, Method):
    """LESS: of many rows those whose gradients point where a few wanted rows point.

    A warm-up leaves points theta_i with Adam's moments and a mean rate eta_i. At each, with g the
    gradient of one row's mean loss::

        row to choose   G_i(z)  = (b1 m + (1 - b1) g) / (1 - b1^t)
                                  / (sqrt((b2 v + (1 - b2) g^2) / (1 - b2^t)) + eps)
        wanted rows     g_i,j   = mean of g over the rows of group j
        score           max_j sum_i eta_i cos(R g_i,j, R G_i(z)),   eta scaled to sum 1

    R (dimension, P) of +1 and -1, made in strips from `seed`: a cosine is off by about 1 / sqrt
    (dimension). The best `fraction` of the rows is chosen, and the base tuned on them from its
    start, by any recipe. Cosines keep short answers from being preferred. Dropout is off.

    ``burnish select`` is its command: a run's checkpoints are the points. By hand::

        scores = burnish.parse("less")[0].lifecycle(tuned, points, rows, {"": wanted})

    rows, wanted: of one row each, what ``tuned.step`` takes; they are gone through once for each
    point. Trains nothing; what is tuned holds what it held. Takes a backward for each row and
    point, `at_once` gradients at a time, and dimension numbers for each group of wanted rows: no
    store of gradients is written. P dimension products a row: 8,192 numbers suit an accelerator,
    1,024 a processor.

    The authors warm up with ``lora(rank=128, alpha=512, dropout=0.1, targets="q,k,v,o")``, 4
    epochs on a random 5 % of the rows at 2e-5.
    """

    paper: ClassVar[str] = ("LESS: Selecting Influential Data for Targeted Instruction Tuning, "
                            "ICML 2024, arXiv:2402.04333")
    tier: ClassVar[str] = "checked against an independent equation"
    at_points: ClassVar[bool] = True

    dimension: int = setting(8192, "numbers that stand for a gradient")
    fraction: float = setting(0.05, "share of the rows that is chosen")
    at_once: int = setting(16, "gradients of rows that exist at once", alias=("together",))
    seed: int = setting(0, "of what is drawn")

    def __post_init__(self) -> None:
        if min(self.dimension, self.at_once) < 1 or not 0 < self.fraction <= 1:
            raise ConfigError("less: a dimension and rows at_once of at least 1 and a fraction "
                              f"above 0 and up to 1 are expected, got {self.dimension}, "
                              f"{self.at_once} and {self.fraction:g}")
        untargeted(self, "a gradient is that of all that the warm-up trains")

    def lifecycle(self, tuned: Any, points: Sequence[Point], rows: Iterable[Any],
                  wanted: Mapping[str, Iterable[Any]], loss: Callable[..., Tensor] | None = None,
                  say: Callable[[str], None] = lambda line: None) -> Tensor:
        """(rows,) scores, higher is nearer to what is wanted."""
        total = sum(p.rate for p in points)
        if not points or not wanted or total <= 0:
            raise ConfigError("less: points of a warm-up, with rates above 0, and wanted rows are "
                              "needed")
        scores = None
        for i, point in enumerate(points):
            with self._at(tuned, point) as moments:
                asked = torch.stack([self._mean(tuned, some, loss) for some in wanted.values()])
                found = [F.normalize(f) @ F.normalize(asked).t() for f in self._towards(
                    tuned, rows, moments, point, loss)]
            if not found:
                raise ConfigError("less: there are no rows to choose from")
            here = point.rate / total * torch.cat(found).cpu()
            scores = here if scores is None else scores + here
            say(f"point {i + 1} of {len(points)}: {len(here)} rows")
        return scores.max(1).values

    def chosen(self, scores: Tensor) -> list[int]:
        """Numbers of the best rows, the best first; of equal ones the earlier."""
        many = max(1, round(self.fraction * len(scores)))
        return scores.sort(descending=True, stable=True).indices[:many].tolist()

    # -- gradients ---------------------------------------------------------------------------------
    def _gradient(self, tuned: Any, batch: Any, loss: Any) -> dict[str, Tensor]:
        grads = tuned.probe(batch, loss).grads
        return {n: grads[n] if n in grads else torch.zeros_like(p)
                for n, p in tuned.named_parameters()}

    def _mean(self, tuned: Any, some: Iterable[Any], loss: Any) -> Tensor:
        """(dimension,): projected, of the mean gradient of some rows."""
        total: dict[str, Tensor] = {}
        for batch in some:
            for n, g in self._gradient(tuned, batch, loss).items():
                total[n] = total[n] + g if n in total else g.clone()
        if not total:
            raise ConfigError("less: a group of wanted rows is empty")
        return projected({n: g.unsqueeze(0) for n, g in total.items()}, self.dimension,
                         self.seed)[0]

    def _towards(self, tuned: Any, rows: Iterable[Any], moments: Mapping[str, Any], point: Point,
                 loss: Any) -> Iterator[Tensor]:
        """(some, dimension): projected, where Adam would go with one row each."""
        left = iter(rows)
        while some := list(islice(left, self.at_once)):
            grads = [self._gradient(tuned, batch, loss) for batch in some]
            yield projected({n: adam_direction(
                torch.stack([g[n] for g in grads]).float(), m["exp_avg"].float(),
                m["exp_avg_sq"].float(), int(m["step"]), point.betas, point.eps)
                for n, m in moments.items()}, self.dimension, self.seed)

    @contextmanager
    def _at(self, tuned: Any, point: Point) -> Iterator[dict[str, Any]]:
        """The model where the warm-up stood, in evaluation mode; the moments of what trains."""
        tensors, moments = point.read()
        live = tuned.tensors(tuned.training)
        if strange := sorted(live.keys() ^ tensors.keys()):
            raise ConfigError(f"less: {strange[0]} is of the model alone or of the warm-up alone")
        params = dict(tuned.named_parameters())
        for n in params:
            if not {"exp_avg", "exp_avg_sq", "step"} <= moments.get(n, {}).keys():
                raise ConfigError(f"less: the warm-up has no moments of Adam for {n}: train it "
                                  "with adamw (the default) and without parts that hold state "
                                  "otherwise")
        held = {n: t.detach().clone() for n, t in live.items()}
        try:
            for n, t in live.items():
                assign(t, tensors[n])
            with evaluating(list(tuned.model.modules())):
                yield {n: {k: v.to(p.device) if isinstance(v, Tensor) else v
                           for k, v in moments[n].items()} for n, p in params.items()}
        finally:
            for n, t in live.items():
                assign(t, held[n])
