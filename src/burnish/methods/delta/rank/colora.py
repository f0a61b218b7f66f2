from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from ....blocks.choose.attribution import Contribution, ranks_to, travelled
from ....blocks.weight.factor import Chain
from ....core.asked import wanted
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Selection, Site
from ....core.targets import match

if TYPE_CHECKING:
    from ....core.anatomy import Anatomy


def ranks(places: Sequence[Place], budget: float, factors: Sequence[float] | None = None
          ) -> list[int]:
    """Ranks of places, in proportion to their widths (and to `factors`), which cost the budget."""
    widths = [min(p.out, p.inp) for p in places]
    weights = widths if factors is None else [f * w for f, w in zip(factors, widths, strict=True)]
    costs = [p.out + p.inp for p in places]
    spend = budget * sum(p.out * p.inp for p in places)
    if sum(costs) > spend:
        raise RecipeError(f"colora: budget={budget:g} buys {int(spend):,} numbers, and a rank of 1 "
                          f"for each of {len(places)} weights takes {sum(costs):,}; raise it, or "
                          "give fewer targets")
    return ranks_to(spend, weights, costs, widths)


@lru_cache(maxsize=8)
def _alike(places: tuple[Place, ...], budget: float) -> dict[Place, int]:
    return dict(zip(places, ranks(places, budget), strict=True))


@dataclass(frozen=True, kw_only=True)
class Colora(Method):
    """CoLoRA: low-rank updates whose ranks follow what each layer contributes to the task.

    ``W' = W + scale B A``, A (r_l, in), B (out, r_l); a convolution is (out, in / groups kernel).
    Before training the model is tuned whole for `steps` updates on calibration data, theta_0 to
    theta_1, and the contribution of a filter is read along the straight line between (FAIG):

        F_f = 1 / N sum_{t=1..N} sum_{k in f} |(theta_1 - theta_0)_k dL/dtheta_k|  at point t / N

    delta_l, its mean over a layer's filters and over samples. Then every bit is back where it was,
    and ``r_l ~ (even + (1 - even) delta_l / mean delta) min(out, in)``, at least 1, with ``sum r_l
    (in + out)`` at `budget` of the targets' entries.

    Depthwise kernels (one input per output) have no rank to lower: they train whole, or stay. With
    `rest` biases and norms train too.

    Reads data first: ``tune(..., calibration=batches)`` with labels. Costs `steps` updates and
    `points` passes per sample; meanwhile the weights twice on the host and Adam's moments on the
    device. Start: B = 0, the pre-trained function exactly. Kept for backward and merging as LoRA.
    The file holds ranks, so a load needs no data; without data (a simulation) delta is the same
    everywhere. Unconfirmed, and so our readings: how delta becomes a rank, that biases and norms
    train, Adam and the lengths of the brief tuning.
    """

    paper: ClassVar[str] = ("Contribution-based Low-Rank Adaptation with Pre-training Model for "
                            "Real Image Restoration (2024), arXiv:2408.01099")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    needs: ClassVar[frozenset[str]] = frozenset({"own loss"})
    small: ClassVar[dict[str, Any]] = {"budget": 0.3, "steps": 3, "points": 2, "lr": 0.01,
                                       "rest": False}

    budget: float = setting(0.07, "numbers that train, of the entries of the targets")
    even: float = setting(0.5, "how far ranks follow the width alone; 0: contributions alone")
    scale: float = setting(1.0, "of the update", other=(2.0,))
    depthwise: Literal["whole", "skip"] = setting(
        "whole", "depthwise kernels train whole, or stay", unseen="needs depthwise kernels among "
        "the targets: tests/methods/test_colora.py")
    rest: bool = setting(True, "biases and norms train too")
    steps: int = setting(50, "updates of the brief tuning")
    lr: float = setting(1e-4, "its learning rate")
    points: int = setting(10, "N, points on the line")
    samples: int = setting(32, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        if not (0 < self.budget < 1 and 0 <= self.even <= 1):
            raise RecipeError("colora: a budget above 0 and below 1 and even from 0 to 1 are "
                              f"expected, got {self.budget} and {self.even}")
        if min(self.steps, self.points, self.samples) < 1 or not self.lr > 0:
            raise RecipeError("colora: steps, points and samples of at least 1 and lr > 0 are "
                              "expected")

    def observe(self, place: Place) -> Contribution | None:
        return None if _depthwise(place) else Contribution(place.out)

    def travel(self, model: nn.Module, batches: Sequence[Any], loss: Callable[[Any], Tensor]
               ) -> Iterator[Mapping[nn.Parameter, Tensor]]:
        return travelled(model, batches, loss, self.steps, self.lr, self.points)

    def settle(self, seen: Mapping[Place, Any]) -> Mapping[Place, dict[str, Any]]:
        shares = [float(s.value.mean()) for s in seen.values()]
        if not (total := sum(shares)) > 0:
            raise RecipeError(f"colora: {self.steps} updates at a learning rate of {self.lr:g} "
                              "change nothing that the loss depends on; raise steps or lr")
        shares = [s / total for s in shares]
        found = ranks(list(seen), self.budget,
                      [self.even + (1 - self.even) * s * len(shares) for s in shares])
        return {p: {"rank": r, "contribution": s}
                for p, r, s in zip(seen, found, shares, strict=True)}

    def delta(self, site: Site) -> Chain | None:
        if _depthwise(site.place):
            return None
        if (rank := site.settled.get("rank")) is None:
            rank = _alike(tuple(p for p in site.places if not _depthwise(p)),
                          self.budget)[site.place]
        term = Chain(site.place, rank, self.scale)
        term.A.burnish_decay = term.B.burnish_decay = False
        return term

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        places = wanted(anatomy, self)
        whole = {f"{p.path}.{p.param}" for p in (match(anatomy) if places is None else places)
                 if _depthwise(p) and self.depthwise == "whole"}
        for name, p in anatomy.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            if name in whole:
                yield Selection(name)
            elif self.rest and p.is_floating_point() and ".burnish." not in f".{name}" \
                    and (leaf.endswith("bias") and p.dim() == 1 or path in anatomy.norms):
                yield Selection(name, decay=False)

    def per_token(self, place: Place, rank: int = 1) -> int:
        """Numbers kept per token besides the input, at this rank."""
        return rank

    def count(self, place: Place, rank: int = 1) -> int:
        """Trainable parameters on one matrix of this rank."""
        return rank * (place.out + place.inp)


def _depthwise(place: Place) -> bool:
    return place.kind == "conv" and place.groups > 1 and place.inp == place.kernel
