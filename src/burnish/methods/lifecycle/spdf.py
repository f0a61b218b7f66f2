from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...blocks.choose.masks import drawn
from ...blocks.weight.provided import Weighted, linear
from ...blocks.weight.pruned import Masked
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Place, Site
from ...core.stage import Stage

if TYPE_CHECKING:
    from ...engine.tuned import Tuned


class Opening(Masked):
    """A mask over a weight that trains, until it is opened: then the weight is what it showed."""

    def __init__(self, mask: Tensor, opened: bool):
        super().__init__(mask)
        self.opened = opened

    def of(self, V: Tensor) -> Tensor:
        return V if self.opened else super().of(V)

    def linear(self, x: Tensor, op: Weighted, bias: Tensor | None, weight: Tensor | None
               ) -> Tensor | None:
        return linear(x, op.unwrapped, bias, weight) if self.opened else None

    def restart(self, V: Tensor) -> None:
        """The mask is drawn: no value of the base has a say."""


@dataclass(frozen=True, kw_only=True)
class Spdf(Method):
    """SPDF: train with a fixed random share of the weights at zero, then with all of them.

    In the first `until` of the run ``W' = M * W``, M (out, in) of zeros and ones drawn once from
    `seed`, ``floor(ratio out in)`` zeros in every matrix of attention and MLP; entries under a zero
    get no gradient. Then W becomes M * W, which is the same function, and M is gone: all entries
    train, the zeros too, with a new optimizer and a schedule of its own, so that moments of revived
    entries begin at zero and their bias is corrected from the first update again.

    Written beside what trains the weights whole: ``full + spdf``. ``burnish.fit`` and
    ``tuned.run(...)`` go through both stages; a loop that asks for neither stays in the first.

    Start: the pruned model, not the pre-trained one. Trains nothing of its own. Kept for backward:
    x; while M stands W' is formed anew in forward and in backward. Merges: to M * W at first, then
    there is nothing to merge. (A second phase of the revived entries alone, or of a LoRA, is
    another recipe on the merged model.) Time is that of dense training: no machine gains from
    scattered zeros without kernels for them.
    """

    paper: ClassVar[str] = ("SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language "
                            "Models (2023), arXiv:2303.10464")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    shown_beside: ClassVar[str] = "full"
    excused: ClassVar[dict[str, str]] = {
        "every_kind_of_place":
            "full trains a fused weight whole, so rows of one are no target of it; "
            "tests/methods/test_spdf.py has fused and transposed weights"}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    ratio: float = setting(0.75, "share of the entries that are zero at first, rounded down")
    until: float = setting(0.5, "share of the run until all entries train",
                           unseen="a loop without stages stays in the first: "
                                  "tests/methods/test_spdf.py")
    seed: int = setting(0, "of the draw")

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or not 0 < self.until < 1:
            raise RecipeError(f"spdf: ratio and until are shares above 0 and below 1, got "
                              f"{self.ratio} and {self.until}")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Opening:
        place = site.place
        zeros = drawn(place.numel, int(self.ratio * place.numel + 1e-9), self.seed, place.name)
        mask = torch.ones(place.numel, dtype=torch.bool).index_fill(0, zeros, False)
        return Opening(mask.view(place.out, place.inp).to(site.weight.device),
                       site.settled.get("opened", False))

    def stages(self, tuned: Tuned, tasks: Sequence[str]) -> Iterator[Stage]:
        if tasks:
            raise RecipeError("spdf divides a run over one data set; give it one")
        name = tuned.training or next(iter(tuned.adapters))
        adapter = tuned.adapters[name]
        for place, _, stored in self.masks(tuned):
            if not any(p is stored for p in adapter.selected.values()):
                raise RecipeError(f"spdf opens weights that train whole, and {place} does not: "
                                  "full + spdf")
        yield Stage(name, until=self.until, then=self.open)
        yield Stage(name)

    def masks(self, tuned: Any) -> Iterator[tuple[str, Opening, Tensor]]:
        """(name of the place, its mask, the parameter) of all."""
        for place, term in tuned.terms(Opening):
            yield place, term, tuned.model.get_parameter(place.partition("[")[0])

    @torch.no_grad()
    def open(self, tuned: Any) -> None:
        """W becomes what it has shown, and its mask is gone. Can be done twice."""
        places: dict[str, Place] = {p.name: p for p in tuned.anatomy.places}
        for name, term, parameter in self.masks(tuned):
            view = places[name].view(parameter)
            view.copy_(term.of(view))
            term.opened = True
            settled = tuned.adapters[tuned.training].settled.setdefault(term.part, {})
            settled.setdefault(name, {})["opened"] = True
        tuned.state.changed()
