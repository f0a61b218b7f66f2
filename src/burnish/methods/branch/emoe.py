from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.emergent import Emergent
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import inner
from ._routed import divide

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.groups import Group
    from ...core.protocols import Attacher
    from ...core.site import Place


@dataclass(frozen=True, kw_only=True)
class Emoe(Method):
    """EMoE: the experts that a pre-trained MLP holds already are told apart, and each token takes a
    few of them.

    The F inner channels fall into `experts` clusters of F / experts each by their keys, the rows of
    the first matrix (of the gate, where there is one), at length one: k-means, in which each round
    serves the nearest first until a cluster is full. ``score_e = x . mean_{j in e} W1_j`` with the
    keys as they stood; the `k` clusters with the largest answer, each with weight 1:
    ``y = sum_e W2_e act(W1_e x + b1_e) + b2``. No noise, no capacity, no loss of balance, no
    gradient of the gate; all clusters together are the MLP exactly.

    Start: of these MLPs k / experts answer, in training and after: not the pre-trained function.
    Trains nothing of its own, and holds no weights: beside it stand low-rank updates without
    dropout, and weights that train whole; functions of weights and branches there are refused. Once
    tuned, k = experts (or leaving it out of the recipe) is the dense MLP with what was learnt.
    k / experts of an MLP's products are made and of its inner states kept; F whole numbers and
    experts d numbers per MLP are in the file. Not mergeable: what answers depends on the token.

    Departures: clusters are found once and the gate stays (the authors can let it follow the keys).
    The means of k-means are balanced greedily, where the authors solve for the best assignment.
    (Which MLPs, and which of gate and up is clustered, are unconfirmed.)
    """

    paper: ClassVar[str] = ("Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers "
                            "Benefit from Emergent Modular Structures? (2023), arXiv:2310.10908")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"inner channels"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    shown_beside: ClassVar[str] = "lora(rank=4)"
    #: all of them: in half precision a token near a tie goes elsewhere, in so small a model too far
    small: ClassVar[Mapping[str, Any]] = {"experts": 4, "k": 4}

    experts: int = setting(64, "clusters of inner channels", other=(8, 2), beside={"k": 1})
    k: int = setting(32, "clusters of a token", other=(2, 1))
    layers: int = setting(2, "MLPs that are divided, the last ones; 0: all", other=(2,),
                          beside={"k": 1})
    seed: int = setting(0, "of the first means", beside={"k": 1}, other=(1, 2, 3))

    def __post_init__(self) -> None:
        if self.experts < 2 or not 1 <= self.k <= self.experts or self.layers < 0:
            raise RecipeError(f"{self}: expected at least 2 experts, k from 1 to as many, and 0 or "
                              "more layers")

    def claims(self) -> tuple[str, ...]:
        return ("which inner channels of an MLP answer",)

    def repeats(self) -> int | None:
        return None if self.layers else 1

    def branch(self, anatomy: Anatomy) -> Iterable[Clusters]:
        found = inner(anatomy)
        if not found:
            raise RecipeError("emoe needs MLPs of linears whose inner channels can be told, and "
                              "this model has none")
        if self.layers > len(found):
            raise RecipeError(f"emoe(layers={self.layers}): this model has {len(found)} such MLPs")
        return [Clusters(self, g) for g in found[-self.layers:]]


@dataclass(frozen=True)
class Clusters:
    """The inner channels of one MLP are divided."""

    method: Emoe
    group: Group

    def install(self, attacher: Attacher, part: Method) -> None:
        m, g = self.method, self.group

        def made(slot: Any, place: Place, first: bool) -> Emergent:
            own = attacher.model.get_submodule(place.path)
            active = ((attacher.adapter.name, 1.0),)
            keys = slot.pairs(own, active, part.name, True)[0]() if first else None
            return Emergent(attacher.state, attacher.adapter.name, slot, g.path, place == g.out,
                            k=m.k, keys=keys, experts=m.experts, seed=m.seed,
                            blank=attacher.adapter.filled)

        divide(attacher, part, g, m.experts, made)
