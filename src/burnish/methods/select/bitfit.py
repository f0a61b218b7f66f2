from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.gates import Shift
from ...core.asked import chosen, narrowed
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Place, Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Bitfit(Method):
    """BitFit: only the biases train.

    ``y = W x + (b + db)``, gradient of b is the sum of g over tokens. Trains every bias of the
    body, those of norms included (the head's biases train with the head); ``which="query-mlp"``
    only the query biases (of a fused bias its rows for queries) and the first bias of every MLP.
    BERT-base: 102,912.

    Start: the pre-trained function. Kept for backward: no linear keeps its input. No weight decay.
    Models without biases (Llama) are refused: biases would have to be added. `targets` narrows it
    to the biases of some weights or modules: ``bitfit(targets="fc1,norm1")``.
    """

    paper: ClassVar[str] = "BitFit (2022), arXiv:2106.10199"
    needs: ClassVar[frozenset[str]] = frozenset({"biases"})

    which: Literal["all", "query-mlp"] = setting("all", "which biases")

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        names = [n for n in self._names(anatomy)
                 if not any(n.startswith(h + ".") for h in anatomy.head)]
        if not names and not self._fused(anatomy):
            raise RecipeError("bitfit: this model has no biases to train; the nearest methods are "
                              "norms (trains norm scales) and ia3")
        for n in chosen(anatomy, self, names, siblings=True):
            yield Selection(n, decay=False)

    def _names(self, anatomy: Anatomy) -> Iterable[str]:
        params = dict(anatomy.model.named_parameters())
        if self.which == "all":
            for n in params:
                leaf = n.rpartition(".")[2]
                if leaf == "bias" or leaf.endswith("_bias") and params[n].dim() == 1:
                    yield n
            return
        for place in anatomy.places:
            bias = bias_of(place)
            if place.role in ("q", "fc1", "gate") and bias in params:
                yield bias

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        """The query rows of fused biases, which are no tensors of their own."""
        sites = self._fused(anatomy)
        for place, rows in narrowed(anatomy, self, sites, lambda s, places: s[0] in places):
            yield Branch(place.path, Shift(rows), compose="replace")

    def _fused(self, anatomy: Anatomy) -> list[tuple[Place, tuple[tuple[int, int], ...]]]:
        """(fused weight, its rows of queries) of every fused bias."""
        sites: list[tuple[Place, tuple[tuple[int, int], ...]]] = []
        if self.which == "all":
            return sites
        for place in anatomy.places:
            base = place.role.removeprefix("cross_")
            if base != "qkv" or bias_of(place) not in dict(anatomy.model.named_parameters()):
                continue
            rows = [s.rows for s in anatomy.slices(place) if s.role == place.role[:-2]]
            if not rows or place.param != "weight":
                why = "stand between those of keys and values" if not rows else \
                    "are read by their module without a call"
                raise RecipeError(f"bitfit(which='query-mlp'): the query biases of {place.name} "
                                  f"{why}; which='all' trains every bias")
            sites.append((place, tuple(rows)))
        return sites


def bias_of(place: Place) -> str:
    """The name its bias would have."""
    name = f"{place.path}.{place.param}" if place.path else place.param
    return f"{name.removesuffix('weight')}bias"
