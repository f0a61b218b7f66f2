from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...core.asked import chosen
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Selection

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Bitfit(Method):
    """BitFit: only the biases train.

    ``y = W x + (b + db)``, gradient of b is the sum of g over tokens. Trains every bias of the
    body, those of norms included (the head's biases train with the head); ``which="query-mlp"``
    only the query biases and the first bias of every MLP. BERT-base: 102,912.

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
        if not names:
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
        wanted = {p.path for p in anatomy.places if p.role in ("q", "fc1", "gate") and not p.rows}
        for path in sorted(wanted):
            if f"{path}.bias" in params:
                yield f"{path}.bias"
