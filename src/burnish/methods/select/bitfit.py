from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from ...blocks.state.gates import Shift
from ...core.asked import chosen, narrowed
from ...core.errors import RecipeError, TargetError
from ...core.method import Method, setting
from ...core.site import Branch, Place, Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

T = TypeVar("T")
#: a fused weight, and the runs of its rows that make queries
Fused = tuple[Place, tuple[tuple[int, int], ...]]


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
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"biases"})

    which: Literal["all", "query-mlp"] = setting("all", "which biases")

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for n in self._asked(anatomy)[0]:
            yield Selection(n, decay=False)

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        """The query rows of fused biases, which are no tensors of their own."""
        for place, rows in self._asked(anatomy)[1]:
            yield Branch(place.path, Shift(rows), compose="replace")

    def _asked(self, anatomy: Anatomy) -> tuple[list[str], list[Fused]]:
        """(biases, rows of fused ones) that targets name; it is an error to name none of both."""
        names = [n for n in self._names(anatomy)
                 if not any(n.startswith(h + ".") for h in anatomy.head)]
        sites = self._fused(anatomy)
        if not names and not sites:
            raise RecipeError("bitfit: this model has no biases to train; the nearest methods are "
                              "norms (trains norm scales) and ia3")
        wrong: list[TargetError] = []

        def named(pick: Callable[[], list[T]]) -> list[T]:
            try:
                return pick()
            except TargetError as e:
                wrong.append(e)
                return []

        left = named(lambda: chosen(anatomy, self, names, siblings=True))
        rows = named(lambda: narrowed(anatomy, self, sites, _names_it))
        if wrong and not left and not rows:
            raise wrong[0]
        return left, rows

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

    def _fused(self, anatomy: Anatomy) -> list[Fused]:
        """(fused weight, its rows of queries) of every fused bias."""
        sites: list[Fused] = []
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


def _names_it(site: Fused, places: list[Place]) -> bool:
    """Is the fused weight among the places, or some of its rows of queries?"""
    whole, rows = site
    return any(p.path == whole.path and p.param == whole.param
               and (p.rows is None or p.rows in rows) for p in places)


def bias_of(place: Place) -> str:
    """The name its bias would have."""
    name = f"{place.path}.{place.param}" if place.path else place.param
    return f"{name.removesuffix('weight')}bias"
