from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ...blocks.state.stream import Hybrid, StreamMask
from ...blocks.update.objective import OnWeights
from ...core.errors import RecipeError
from ...core.events import EARLY
from ...core.method import Method, setting
from ...core.site import Branch
from ...core.stream import Stream, stream, taken

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Pat(Method):
    """PAT: one mask over the channels of the residual stream, trained with what makes up for them.

        f(x) = v * mask * (x + W_u W_d x)         mask = sigmoid(kappa m) + max(1/2 - t / T, 0)

    behind the embedding, each attention and each MLP: W_d (rank, d), W_u (d, rank), v (d) at each
    of them, m (d) once. kappa = 1 / (1 - ln t / ln T + 1e-6) after t of T updates, t >= 1. Beside
    the task's loss: ``weight |sum [m >= 0] - keep| / keep`` (straight through to m), mean (m -
    1/2)^2 over m > 0 plus mean (m + 1/2)^2 over the others, and ``ortho mean (W_d W_d^T - I)^2`` of
    each site. Written beside what trains the rest: ``lora(rank=20) + pat``.

    keep = (1 - ratio) d, or the next smaller width that the model's config takes (a multiple of
    Llama's number of heads). After the share `search` of the run m is settled: the `keep` channels
    of the largest m are ones, the others zeros.

    ``tuned.shrink()`` folds every f into the matrix before it, which is exact, and takes the other
    channels out of all matrices, tables and norms: a dense model of hidden size `keep`. That is
    exact of RMSNorm alone (core/stream.py); models whose norms subtract a mean, normalise behind a
    sub-layer or read the stream in ways that are not told are refused, with the reason.

    Start: W_u = 0, m = 0, v = 1, the pre-trained function exactly. Trains 2 rank d + d per site and
    d once. Kept for backward: x of every site. Without the number of steps (``tuned.total_steps``)
    t stays 0 and nothing is pruned. No weight decay on m and v.

    Departures: the code leaves m to its sigmoid, where it rounds it at the end, with as many ones
    as there are: a config wants one number, and what trains last is then what is sliced. It counts
    the penalty on W_d of the last block alone (here: of all). Behind a table that is tied to the
    head stands the mask without W and v, which the head would read too.
    """

    paper: ClassVar[str] = "PAT: Pruning-Aware Tuning for Large Language Models (2024), " \
                           "arXiv:2408.14721"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"stream"})

    rank: int = setting(200, "rank of what mixes the channels", alias=("r",))
    ratio: float = setting(0.25, "share of the channels that is taken out")
    search: float = setting(0.8, "share of the run after which the mask is settled",
                            other=(0.5,))
    weight: float = setting(10.0, "of the penalty on another number of channels")
    ortho: float = setting(1.0, "of the penalty on W_d that is not orthonormal")

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.ratio < 1 or not 0 < self.search <= 1:
            raise RecipeError("pat: rank >= 1, 0 < ratio < 1 and 0 < search <= 1 are expected")

    def claims(self) -> tuple[str, ...]:
        return ("the width of the residual stream",)

    def keep(self, anatomy: Anatomy) -> tuple[Stream, int]:
        """The stream, and how many of its channels stay."""
        found = stream(anatomy)
        if isinstance(found, str):
            raise RecipeError(f"pat: this model has no residual stream whose channels can be taken "
                              f"out: {found}")
        if self.rank > found.width:
            raise RecipeError(f"pat(rank={self.rank}): the stream has {found.width} channels")
        keep = taken(anatomy, int((1 - self.ratio) * found.width + 1e-9))
        if keep < 1:
            raise RecipeError(f"pat(ratio={self.ratio}): the model's config takes no width as "
                              f"small as that share of {found.width}")
        return found, keep

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        found, _ = self.keep(anatomy)
        mask = StreamMask(found.width)
        for n, place in enumerate((*found.tables, *found.writers)):
            tied = found.tied and place in found.tables
            made = Hybrid(mask, found.width, 0 if tied else self.rank, owns=n == 0, tied=tied)
            yield Branch(place.path, made, compose="replace")

    def objective(self, tuned: Tuned, run: Any) -> Iterator[OnWeights]:
        sites, keep = [h for _, h in tuned.branches(Hybrid)], self.keep(tuned.anatomy)[1]
        mask = mask_of(tuned)
        yield OnWeights((mask.m,), partial(self._mask, mask, keep))
        for site in sites:
            if site.rank:
                yield OnWeights((site.A,), lambda site=site: self.ortho * site.apart())

    def _mask(self, mask: StreamMask, keep: int) -> Tensor:
        return mask.open() * (self.weight * mask.undecided(keep) + mask.poles())

    def controller(self, tuned: Tuned) -> Search:
        return Search(mask_of(tuned), self.keep(tuned.anatomy)[1], self.search)

    def count(self, d: int, sites: int) -> int:
        """Trainable parameters on a stream of `d` channels with so many sites."""
        return sites * (2 * self.rank + 1) * d + d


def mask_of(tuned: Tuned) -> StreamMask:
    """The one mask of all sites."""
    return next(h.mask for _, h in tuned.branches(Hybrid))


class Search:
    """The schedule of the mask. Early, so that an update begins with the mask it is for."""

    phase: ClassVar[int] = EARLY

    def __init__(self, mask: StreamMask, keep: int, search: float):
        self.mask, self.keep, self.search = mask, keep, search
        self.total: int | None = None
        self.over = False                            # settled already, as far as is known here

    def start(self, total: int | None) -> None:
        self.total = total

    def step_begin(self, step: int) -> None:
        if self.total is None or self.over:
            return
        self.over = step >= int(self.search * self.total + 1e-9)
        if self.over:
            self.mask.settle(self.keep)
        else:
            self.mask.at(step, self.total)

    def state_dict(self) -> Mapping[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]
