from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from ...blocks.choose.similar import by_twos, clustered, neighbours, runs_of, spread
from ...blocks.state.emulated import Emulator, blocks_of, emulated, plugged
from ...core.anatomy import Anatomy
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import module_of, untargeted


@dataclass(frozen=True, kw_only=True)
class Crash(Method):
    """CRaSh: a smaller model of a large one's blocks to train on; what trained is plugged back.

    Clustering: intervals of the N blocks. Those that train stand alone (a best reading, as is the
    default of `intervals` at other depths); of the others the two neighbours are joined, again and
    again, whose blocks at the border are most alike::

        CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)

    of the centred states behind them on a support set, until `intervals` are left. Removing: of
    each its middle block stays. Sharing: it runs wherever one of its cluster did, its weights held
    once; with share=False it runs once. `layers` blocks train, evenly spread (4 of 32: 0, 10, 21,
    31, where the paper has 0, 8, 17, 31) or half at either end; no block that trains is repeated.
    Offsite tuning, where of the middle the first of every two stays, is
    ``crash(outer=True, cluster="turn", share=False)``::

        method = burnish.parse("crash")[0]
        emulator = method.lifecycle(model, batches)               # the owner of the model
        tuned = burnish.tune(emulator.model, f"full(targets={emulator.targets!r})")
        ...                                                       # the owner of the data
        method.plug(model, emulator, tuned)                       # the trained blocks return

    For a low-rank part ``emulator.linears`` names the linears; merge it before it is plugged. With
    a head that trains the head returns too. The whole model is not changed by ``lifecycle``, nor
    read while the emulator trains.

    The emulator is another function than the model, near it where clusters are alike. Plugged in
    untrained it gives the model bit for bit. Its weights: (intervals + layers) / N of the blocks;
    repeated blocks cost time and no weights. Reading takes 2 N - 1 matrices of d x d in fp64.
    Trains nothing itself. The blocks of the model are one list, all of the same tensors. The
    published distillation of an emulator towards the model is left out: CRaSh does without.
    """

    paper: ClassVar[str] = ("CRaSh: Clustering, Removing, and Sharing Enhance Fine-tuning without "
                            "Full Large Language Model (2023)")
    tier: ClassVar[str] = "from the text"

    layers: int = setting(4, "how many blocks train")
    intervals: int | None = setting(None, "clusters of the others, one block of each stays; None: "
                                          "11 of 14, as published, 22 of 28")
    outer: bool = setting(False, "those that train are the first and the last")
    cluster: Literal["cka", "turn"] = setting("cka", "clusters of blocks that are alike, or of two")
    share: bool = setting(True, "a block that stays runs in the place of those it stands for")

    def __post_init__(self) -> None:
        if self.layers < 1 or self.intervals is not None and self.intervals < 1:
            raise ConfigError("crash: layers and intervals of at least 1 are expected, got "
                              f"{self.layers} and {self.intervals}")
        if self.cluster == "turn" and self.intervals is not None:
            raise ConfigError("crash: cluster='turn' keeps the first of every two blocks; "
                              "intervals does nothing")
        untargeted(self, "layers says how many blocks train")

    def trained(self, blocks: int) -> tuple[int, ...]:
        """Numbers of the blocks that train."""
        if self.layers >= blocks:
            raise ConfigError(f"crash: {self.layers} of {blocks} blocks train, and none is left to "
                              f"stand for others: layers={blocks - 1} or less")
        first = (self.layers + 1) // 2
        return (*range(first), *range(blocks - self.layers + first, blocks)) if self.outer \
            else spread(blocks, self.layers)

    def many(self, blocks: int) -> int:
        """Clusters of the blocks that do not train."""
        frozen, least = blocks - self.layers, len(runs_of(blocks, self.trained(blocks)))
        many = max(frozen * 11 // 14, least) if self.intervals is None else self.intervals
        if not least <= many <= frozen:
            raise ConfigError(f"crash: {frozen} blocks in {least} runs between those that train "
                              f"make from {least} to {frozen} clusters, not {many}")
        return many

    def lifecycle(self, model: nn.Module, batches: Iterable[Any]) -> Emulator:
        """The emulator of a plain model, by batches of a support set."""
        if not isinstance(model, nn.Module) or any(hasattr(m, "burnish") for m in model.modules()):
            raise ConfigError("crash makes an emulator of a plain model, and a recipe is joined to "
                              "this one: merge or detach it first")
        stacks = Anatomy.of(model).stacks()
        if len(stacks) != 1:
            raise ConfigError(f"crash: one stack of blocks is expected, and {type(model).__name__} "
                              f"has {len(stacks)}")
        stack = next(iter(stacks))
        blocks = blocks_of(model, stack, "crash")
        n = len(blocks)
        alone, many = self.trained(n), self.many(n)
        alike = neighbours(model, [f"{stack}.{i}" for i in range(n)], batches, "crash")
        clusters = by_twos(n, alone) if self.cluster == "turn" else clustered(alike, alone, many)
        kept = [(a + b) // 2 for a, b in clusters]
        stands = {i: k for (a, b), k in zip(clusters, kept, strict=True) for i in range(a, b + 1)}
        made, places = emulated(model, stack, blocks, stands, self.share)
        return Emulator(made, stack, tuple(clusters), tuple(kept), alone, places, tuple(alike))

    def plug(self, model: nn.Module, emulator: Emulator, trained: Any = None) -> None:
        """Put what was trained into the whole model, in place. trained: the emulator's model, or
        what ``tune`` returned of it, or another copy of it; None: the emulator's own."""
        back = emulator.model if trained is None else module_of(trained)
        plugged(model, emulator, back, Anatomy.of(model).head, "crash")
