from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.choose.contribution import Contribution, channels, ranked
from ...blocks.choose.evolve import evolve
from ...blocks.weight.channels import KernelSlice
from ...blocks.weight.slices import Slice
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Place, Selection, Site
from ...core.targets import match
from .bitfit import bias_of

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

#: shares of a layer's input channels that may train
SHARES = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class SparseUpdate(Method):
    """The sparse update of training in 256 KB: late biases, and some input channels of weights.

        y = x W^T + x[:, at] V^T + b + db          dV = g^T x[:, at],  db = sum of g

    The biases of the `last` layers train (of those that targets name, in the model's order), and of
    their weights the share `density` of the input channels with the largest norms. ``density=0``:
    biases alone, so ``sparse_update(last=20, density=0) + sparse_update(targets='fc1', last=4)``
    says both sets. Of a depthwise convolution whole channels train; a fused weight (q, k and v) is
    one layer, whose channels are those of all; some of its rows train without a bias.

    `memory`: a search chooses the layers and each one's share, {0, 1/8, 1/4, 1/2, 1}, so that what
    updating each alone gains adds up to the most while ``sum k (tokens itemsize + 4 out)`` bytes
    stay within it: k kept channels of one sample's input, and their gradients. The gain is given
    (`contributions`: rows of a weight's name and its gain at each share) or read from calibration
    data: the squares of the gradient there, what a small step of SGD takes off the loss.
    (Published: the accuracy after training each tensor alone, which a table may hold.)

    Start: the pre-trained function. Kept for backward: k numbers a token, a byte each beside
    `int8_graph`; nothing for a bias, nothing below the layers that train. V is in real units, so
    plain SGD on it is what QAS makes of SGD on the integers: ``V = s_W V_int`` gives
    ``dV = s_W (dV_int / s_W^2)``. Merges exactly where the storage does.

    Departures: V stands beside the weight, in fp32, until a merge; norms have biases of their own,
    which stay. A convolution whose padding is no number of zeros keeps its input.
    """

    paper: ClassVar[str] = "On-Device Training Under 256KB Memory, NeurIPS 2022, arXiv:2206.15472"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})
    by_data: ClassVar[bool] = True
    keeps_input: ClassVar[bool] = False

    last: int = setting(20, "layers, from the output, that train", other=(1,))
    density: float = setting(0.25, "share of their input channels; 0: biases alone", other=(0.5,))
    memory: int | None = setting(None, "bytes that a search may spend on weights", other=(4000,))
    itemsize: int = setting(4, "bytes of a kept number, for the search; 1 beside int8_graph",
                         other=(64,), beside={"memory": 4000})
    contributions: tuple[Any, ...] | list[Any] | None = setting(
        None, "gains of weights at each share, rows of a name and four numbers; None: by data",
        unseen="it names weights of one model: tests/methods/test_sparse_update.py")
    samples: int = setting(
        128, "samples to read for the search", other=(1,), beside={"memory": 4000},
        unseen="another sample may say the same choice: tests/methods/test_sparse_update.py")
    seed: int = setting(
        0, "of the search", beside={"memory": 4000},
        unseen="searches of a few layers find the same: tests/methods/test_sparse_update.py")

    def __post_init__(self) -> None:
        if self.last < 1 or self.samples < 1 or self.itemsize < 1:
            raise RecipeError("sparse_update: last, samples and itemsize are at least 1, got "
                              f"{self.last}, {self.samples} and {self.itemsize}")
        if self.density not in (0, *SHARES):
            raise RecipeError(f"sparse_update: density={self.density}: expected 0, 0.125, 0.25, "
                              "0.5 or 1.0")
        if self.memory is not None and self.memory < 1:
            raise RecipeError(f"sparse_update: memory={self.memory}: expected bytes, 1 or more")
        dead = [n for n in ("itemsize", "contributions", "samples", "seed") if n in self.changed()]
        if self.memory is None and dead:
            raise RecipeError(f"sparse_update: {dead[0]} does nothing without memory=")
        if self.memory is not None and "density" in self.changed():
            raise RecipeError("sparse_update: with memory= the search says each density")
        for row in self.contributions or ():
            if not isinstance(row, tuple | list) or len(row) != 5 or type(row[0]) is not str \
                    or not all(isinstance(g, int | float) for g in row[1:]):
                raise RecipeError(f"sparse_update: contributions has rows such as ('a.weight', .1, "
                                  f".2, .3, .4), a gain for each share; got {row!r}")

    def repeats(self) -> int | None:
        """Which layers train depends on their place."""
        return None

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        """The biases."""
        asked = wanted(anatomy, self)
        found = match(anatomy) if asked is None else asked
        known = dict(anatomy.model.named_parameters())
        for place in self.late([p for p in found if p.kind in self.kinds]):
            if place.rows is None and bias_of(place) in known:
                yield Selection(bias_of(place))

    def late(self, places: Iterable[Place]) -> list[Place]:
        return list(places)[-self.last:]

    def observe(self, place: Place) -> Contribution | None:
        if self.memory is None:
            return None
        return Contribution(place, given=self.contributions is not None)

    def settle(self, seen: Mapping[Place, Any]) -> Mapping[Place, dict[str, Any]]:
        late = set(self.late(seen))
        counts = {p: [self.many(p, share) for share in SHARES] if p in late else [] for p in seen}
        gains = {p: self.gained(p, s, counts[p]) for p, s in seen.items()}
        costs = {p: [k * s.cost(self.itemsize) for k in counts[p]] for p, s in seen.items()}
        chosen = evolve([[0.0, *gains[p]] for p in seen], [[0, *costs[p]] for p in seen],
                        self.memory or 0, self.seed)
        return {p: {"channels": [0, *counts[p]][j]} for p, j in zip(seen, chosen, strict=True)}

    def many(self, place: Place, share: float) -> int:
        return max(1, int(channels(place) * share)) if share else 0

    def gained(self, place: Place, seen: Contribution, counts: list[int]) -> list[float]:
        """What updating this weight alone gains, for each number of channels."""
        if self.contributions is None or not counts:
            return [float(seen.gain[seen.order[:n]].sum()) for n in counts]
        told = {name: list(map(float, gains)) for name, *gains in self.contributions}
        if place.name not in told:
            raise RecipeError(f"sparse_update: contributions says nothing of {place.name}; it "
                              f"names {', '.join(told)}")
        return told[place.name]

    def delta(self, site: Site) -> Slice | KernelSlice | None:
        place = site.place
        if place not in self.late(site.places):
            return None
        whole = 1.0 if self.memory is not None else self.density
        n = site.settled.get("channels", self.many(place, whole))
        at = ranked(place, site.weight.detach())[:n]
        if place.kind == "conv":
            return KernelSlice(place, at)                # without channels too: it keeps no input
        return Slice(place, at) if n else None

    def per_token(self, place: Place, channels: int | None = None) -> int:
        """Numbers kept per token."""
        return self.many(place, self.density) if channels is None else channels

    def count(self, place: Place, channels: int | None = None) -> int:
        """Trainable parameters on one matrix, beside its bias."""
        n = self.many(place, self.density) if channels is None else channels
        return n * place.out // place.groups * place.kernel
