from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.sources import Fused
from ...core.site import Branch
from ..branch._sites import found, mlp_ends
from ._sources import FromSources

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(FromSources):
    """AdapterFusion: a new task attends to other tasks' adapters, token by token.

    ``F <- F + V sum_s a_s o_s`` on an MLP's result F, ``a = softmax_s((Q F + q) . K o_s)``,
    ``o_s = U_s act(D_s F + b_s) + c_s`` source s's `pfeiffer` adapter, which stays as it is; Q, K,
    V (d, d), softmax in fp32.

    A run over `sources` + 1 tasks (``burnish.fit``, ``tuned.run``) trains an adapter on each of the
    first, then Q, K and V (and a head of its own) on the last; :meth:`lifecycle` combines adapters
    that are there already, whose number is `sources`. Until either the sources are random.

    Departure: the authors' keys have a bias too, which adds one number to the scores of all sources
    and so does nothing; it is left out. No term holds V at the identity.

    Start: Q and K normal of deviation 0.02, q = 0, V the identity: near the mean of the sources,
    not the pre-trained function. Trains 3 d^2 + d per block. Kept for backward: F, once. Not
    mergeable: the weights depend on the token. `scalearn` does the same with a few thousand
    numbers.
    """

    paper: ClassVar[str] = ("AdapterFusion: Non-Destructive Task Composition for Transfer Learning "
                            "(2021), arXiv:2005.00247")
    tier: ClassVar[str] = "checked against an independent equation"

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            yield Branch(s.path, Fused(self.sources, s.width, self.width(s.width), self.act))

    def lifecycle(self, tuned: Any, name: str, sources: Sequence[str]) -> None:
        """Add an adapter `name` with this part, which combines the adapters `sources` (of
        `pfeiffer` or of its form; they need not stay), and use it. Raises RecipeError for adapters
        that are no such sources."""
        self.combine(tuned, name, sources)

    def count(self, d: int) -> int:
        """Trainable parameters of one block of width d."""
        return 3 * d * d + d
