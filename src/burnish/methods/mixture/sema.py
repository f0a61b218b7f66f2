from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.expanding import Descriptor, Modular, shifted
from ...core.batches import call, moved
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.recipe import Recipe
from ...core.site import Branch
from ...core.stage import Stage
from ..branch._sites import Site, found, mlp_ends, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

_RUN = "only a run in stages reads it: tests/methods/test_sema.py"
_SCAN = "only a scan of further data reads it: tests/methods/test_sema.py"


@dataclass(frozen=True, kw_only=True)
class Sema(Method):
    """SEMA: adapters beside the MLPs, and more of them where what comes is unlike all before.

    ``F(x) <- F(x) + f(x)``, ``f(x) = U relu(D x + b) + c`` of width m, x what the MLP reads. At
    `layers` each adapter f_e has a router unit and a descriptor, and they are weighed by the mean
    x- of the sample's tokens: ``sum_e g_e f_e(x)``, ``g = softmax_e(w_e . x- + a_e)``. The
    descriptor is a linear autoencoder d -> k -> d, trained by ``rho = mean (AE(x-) - x-)^2``, no
    gradient into x-; its last `buffer` errors give ``z = |rho - mean| / s`` of a sample.

    The first adapter of a model has one f in every block. :meth:`lifecycle` scans a further task's
    data: the shallowest of `layers` where ``min_e mean_batch z_e > threshold`` gets one more, in an
    adapter of its own (``sema(grown=block)``) that trains beside all others, which stay as they
    are, with an optimizer of its own; one file holds them all, records of errors too. In stages
    (``burnish.fit``, or ``tuned.run(method.stages(tuned, ()), data, total=...)`` after growth, too)
    descriptors train after adapters and routers, elsewhere beside them. A task by itself, head and
    all: the learner ``sema`` of ``burnish.continual``.

    Start: U = b = c = 0, the pre-trained function exactly. Trains 2 d m + m + d per block, and at
    `layers` 2 d k + k + d of the descriptor, d + 1 of a grown one's router (the first's has no
    gradient beside nothing, and stays as drawn). Kept for backward: m numbers per token, d more
    where several adapters answer. Not mergeable: the sample decides.

    Departures: padding is left out of x-. Errors are recorded while a descriptor trains, and not
    before (the last 500 are the same after as many samples).
    """

    paper: ClassVar[str] = ("Self-Expansion of Pre-trained Models with Mixture of Adapters for "
                            "Continual Learning (2024), arXiv:2403.18886")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp"})
    merges: ClassVar[bool] = False
    relies_on: ClassVar[tuple[str, ...]] = ("objective",)
    small: ClassVar[dict[str, Any]] = {"bottleneck": 8, "layers": (1,), "descriptor": 8}

    bottleneck: int = setting(16, "m, width of an adapter", alias=("reduced", "width"))
    layers: tuple[int, ...] = setting((9, 10, 11), "blocks that may grow, by number",
                                      other=((0, 1),))
    descriptor: int = setting(128, "k, inner width of the autoencoder", other=(4,))
    threshold: float = setting(2.0, "z above which nothing before is like it", unseen=_SCAN)
    buffer: int = setting(500, "errors of a descriptor that are remembered")
    descriptor_rate: float = setting(2.0, "learning rate of descriptors over that of adapters")
    functional: float = setting(0.5, "share of a run in which adapters train, before descriptors",
                                unseen=_RUN)
    grown: int | None = setting(None, "the one block of an adapter that was added; None: all",
                                unseen="it trains beside others alone: tests/methods/test_sema.py")

    def __post_init__(self) -> None:
        if min(self.bottleneck, self.descriptor) < 1 or self.buffer < 3 or self.threshold < 0 \
                or not self.descriptor_rate > 0 or not 0 < self.functional < 1:
            raise RecipeError(f"{self}: expected widths of at least 1, a buffer of at least 3, a "
                              "threshold of at least 0, a descriptor_rate above 0 and functional "
                              "between 0 and 1")
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise RecipeError(f"sema(layers={self.layers}): expected numbers of blocks, each once")
        if self.grown is not None and (self.grown not in self.layers or self.targets is not None):
            raise RecipeError(f"{self}: an adapter that was added stands in one of layers="
                              f"{self.layers}, and has no targets of its own")

    def claims(self) -> tuple[str, ...]:
        return ("adapters added on demand",)

    def repeats(self) -> int | None:
        return None

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        if max(self.layers) >= len(anatomy.blocks):
            raise RecipeError(f"sema(layers={self.layers}): the model has blocks 0 to "
                              f"{len(anatomy.blocks) - 1}")
        number = {b.path: n for n, b in enumerate(anatomy.blocks)}
        sites = list(mlp_ends(anatomy))
        sites = found(anatomy, sites, self, "MLP") if self.grown is None else \
            [s for s in sites if number[s.block.path] == self.grown]
        wanted = self.layers if self.grown is None else (self.grown,)
        if left := sorted(set(wanted) - {number[s.block.path] for s in sites}):
            raise RecipeError(f"sema: block {left[0]} is to grow, and has no MLP among those it "
                              "stands beside")
        for s in sites:
            yield self._beside(s, number[s.block.path])

    def _beside(self, s: Site, number: int) -> Branch:
        path, d = s.block.mlp or s.path, s.width
        made: Any = Bottleneck(d, self.bottleneck)
        if number in self.layers:
            made = Modular(number, path, d, self.bottleneck, Descriptor(
                d, self.descriptor, self.buffer, self.descriptor_rate), self.grown is None)
        return Branch(path, made, read=(s.block.mlp or s.block.mlp_in[0], "input"))

    def stages(self, tuned: Any, tasks: Sequence[str]) -> Iterator[Stage]:
        """Adapters and routers of the adapter that trains, then its descriptors."""
        if tasks:
            raise RecipeError("sema finds from each task's data whether an adapter comes: train on "
                              "the tasks one by one, with its lifecycle in between (the learner "
                              "'sema' of burnish.continual)")
        name = tuned.training or next(iter(tuned.adapters))
        others = {n: w for n, w in tuned.state.active if n != name}
        yield Stage(name, beside=others, until=self.functional, only=lambda n: not described(n))
        yield Stage(name, beside=others, only=described)

    def lifecycle(self, tuned: Any, name: str, batches: Iterable[Any],
                  but: Collection[int] = ()) -> int | None:
        """Scan a task's batches (the model's inputs) under all that is in use; where they are
        unlike what was there, add the adapter `name` at the shallowest such block that is not among
        `but`, train it beside the others, and return the block. None: nothing was added."""
        active = dict(tuned.state.active)
        first = next((a for n, a in tuned.adapters.items() if n in active and any(
            isinstance(m, Sema) for m in a.recipe)), None)
        sites: dict[int, list[Modular]] = {}
        for n in active:
            for _, m in tuned.branches(Modular, n):
                sites.setdefault(m.number, []).append(m)
        if first is None or not sites:
            raise RecipeError("sema: none of its adapters is in use, so there is nothing that "
                              "could see a shift")
        device, training = next(tuned.model.parameters()).device, tuned.model.training
        tuned.model.eval()
        try:
            block = shifted([sites[n] for n in sorted(sites) if n not in but],
                            lambda batch: call(tuned.model, moved(batch, device)), batches,
                            self.threshold)
        finally:
            tuned.model.train(training)
        if block is None:
            return None
        own = [replace(m, grown=block, targets=None) if isinstance(m, Sema) else m
               for m in first.recipe if isinstance(m, Sema) or set(m.axes()) == {"optimizer"}]
        tuned.add(name, Recipe(own), head=False, seed=first.seed + len(tuned.adapters))
        tuned.use({**active, name: 1.0}, train=name)
        return block

    def count(self, d: int, grows: bool = False) -> int:
        """Trainable parameters of one block of width d; of a grown adapter, with `grown`."""
        own, k = Bottleneck.count(d, self.bottleneck), self.descriptor
        more = 2 * d * k + k + d if grows else 0
        return own + more + (d + 1 if self.grown is not None else 0)


def described(name: str) -> bool:
    """Is it a tensor of a descriptor?"""
    return ".descriptor." in name
