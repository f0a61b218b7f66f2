from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...blocks.state.attending import open_attentions
from ...blocks.state.queries import Columns, Queried
from ...blocks.update.objective import OnWeights
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import head_linear, refuse, unmet
from ...core.stage import Stage
from ..branch._sites import samples_first
from ..prompt.vpt import patch_inputs
from ._beside import frozen, still, width

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Tuned


@dataclass(frozen=True, kw_only=True)
class Vqt(Method):
    """VQT: query-only tokens that summarise every layer of a frozen transformer for its head.

    ``q = W_q Norm(Q_m)``, K and V of the block's tokens Z_{m-1} alone, and the rest of the block as
    it is: ``O = Q_m + W_o softmax(t q K^T) V``, ``S_m = O + MLP(Norm O)``; the tokens never see the
    queries Q_m (length, d). The head reads ``[z; s_1; ..; s_L]``, s_m the mean of S_m:
    ``y = head(z) + sum_m V_m s_m``, V_m (classes, d).

    With ``weight > 0`` the lengths of the columns of V are held down (a group lasso), and with
    ``density < 1`` a run has two stages: after `search` of it that share of the features, those
    with the longest columns, is kept, and V begins again on them (``fit``, ``tuned.run``).

    Start: Q as in `vpt`, V = 0: the pre-trained function exactly. Trains L length d + L d classes
    (92,160 at ten tokens on ViT-B, and the columns), and length more per block with `weighted`.
    Kept for backward: no block's tokens, only how their keys and values vary together under a
    query, min(length h, 2 tokens) numbers per channel (h width of a head). Not mergeable.

    The backbone runs in evaluation mode without a graph; what trains below the head is refused.
    Departures: V = 0 (the authors draw it); features are chosen among those of the queries.
    """

    paper: ClassVar[str] = ("Visual Query Tuning: Towards Effective Usage of Intermediate "
                            "Representations for Parameter and Memory Efficient Transfer Learning "
                            "(2023), arXiv:2212.03220")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"whole reading", "open attention", "linear head"})
    merges: ClassVar[bool] = False

    length: int = setting(10, "queries per block", alias=("num_tokens",))
    weighted: bool = setting(False, "a mean of the queries by weights that train")
    weight: float = setting(0.0, "of the group lasso on the new columns of the head")
    density: float = setting(1.0, "share of the features that stays",
                             unseen="a run has stages then: tests/methods/test_vqt.py")
    search: float = setting(0.5, "share of the run before features are chosen",
                            unseen="only a run in stages reads it: tests/methods/test_vqt.py")

    def __post_init__(self) -> None:
        if self.length < 1:
            raise RecipeError(f"vqt(length={self.length}): expected at least one query")
        if self.weight < 0 or not 0 < self.density <= 1 or not 0 < self.search < 1:
            raise RecipeError(f"vqt(weight={self.weight}, density={self.density}, search="
                              f"{self.search}): expected a weight of 0 or more, a density above 0 "
                              "and up to 1, a share of the run between 0 and 1")
        if self.density == 1 and self.search != Vqt.search:
            raise RecipeError(f"vqt: search={self.search} says when features are chosen, and "
                              "density=1 chooses none: leave it out, or take a density below 1")

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",)

    def side(self, anatomy: Anatomy) -> Vqt:
        if self.targets is not None:
            raise RecipeError("vqt takes no targets: it reads all blocks")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        open_attentions(anatomy, self.name)
        return self

    def install(self, attacher: Any, part: Method) -> None:
        anatomy, state, name = attacher.anatomy, attacher.state, attacher.adapter.name
        (blocks,) = anatomy.stacks().values()
        frozen(attacher, part, tuple(f"{h}." for h in anatomy.head))
        d = width(anatomy, part, [blocks])
        still(attacher, part, [blocks])
        v = (6 / ((patch_inputs(anatomy, blocks[0].stack) or d) + d)) ** 0.5
        for block in blocks:
            rows = torch.empty(self.length, d).uniform_(-v, v)
            Queried(state, name, rows, self.weighted).to(attacher.device(block.path)).listen(
                attacher.slot(block.path), part.name)
        head: Any = head_linear(anatomy)
        Columns(state, name, len(blocks) * d, head.out).to(attacher.device(head.path)).listen(
            attacher.slot(head.path), f"{part.name}_head")

    def objective(self, tuned: Tuned, run: Any) -> Iterable[OnWeights]:
        for columns in self.columns(tuned) if self.weight else ():
            yield OnWeights((columns.weight,), lambda c=columns: self.weight * c.lasso(),
                            lambda c=columns: [self.weight * c.lasso_gradient()])

    def stages(self, tuned: Tuned, tasks: Sequence[str]) -> Iterator[Stage]:
        if self.density < 1:
            name = tuned.training or next(iter(tuned.adapters))
            yield Stage(name, until=self.search, then=self.choose)
            yield Stage(name)

    def choose(self, tuned: Any) -> None:
        """Keep the features with the longest columns."""
        for columns in self.columns(tuned):
            columns.choose(self.density)

    def columns(self, tuned: Any) -> list[Columns]:
        """Of the head, in the adapter that trains."""
        found = (m for m in tuned.model.modules() if isinstance(m, Columns))
        return [m for m in found if m.weight.requires_grad]

    def count(self, blocks: int, d: int, classes: int) -> int:
        """Trainable parameters beside so many blocks of width d, the model's own head left out."""
        return blocks * (self.length * (d + self.weighted) + d * classes)
