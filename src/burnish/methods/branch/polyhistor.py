from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.another import beside
from ...blocks.state.decomposed import Decomposed, Templates, stored
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import attention_ends, found, mlp_ends, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Polyhistor(Method):
    """Polyhistor: adapters of several tasks, of small generated factors that layers make larger.

    ``a(h) = h + gelu(h D) U`` behind attention and MLP, before the residual. Of a task's vector z
    (embedding) two small matrices P (d0, rank) and Q (rank, m) are generated, linearly; the weight
    of a layer of width a d0 is ``S_l (x) (P Q)``, S_l (a, a) its own: D is (a d0, a m), U (a m,
    a d0) of factors of its own, d0 the model's narrowest width, m = d0 / reduction. So one template
    serves all stages of a hierarchical model, and no site has more than 2 a^2 numbers. The batch
    names ``task``: one id per sample, or one for all.

    lite=True: the factor of d0 is one tensor for both matrices and all tasks (transposed and of the
    size of Q in U), and only those of m are generated.

    Start: S_l of U is zero, of D the identity: the pre-trained function exactly. Trains 2 embedding
    rank (d0 + m) in all (lite: 2 embedding rank m + d0 rank), tasks embedding, and 2 a^2 per site.
    Kept for backward per site: h; the adapter is generated again. Not mergeable (it follows the
    sample); :meth:`lifecycle` makes one task's adapters plain ones. No weight decay on S. Every
    width is a multiple of the narrowest, else it is refused. (The factors' shapes, where they
    stand, what lite shares and all starts are a reading of the paper, unconfirmed.)
    """

    paper: ClassVar[str] = ("Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense "
                            "Vision Tasks (2022), arXiv:2210.03265")
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    context: ClassVar[Mapping[str, Key]] = {"task": Key("one task id per sample", below="tasks")}
    merges: ClassVar[bool] = False

    tasks: int = setting(2, "how many tasks")
    embedding: int = setting(64, "width of a task's vector")
    rank: int = setting(4, "of a template")
    reduction: int = setting(12, "d0 over the template's bottleneck m")
    lite: bool = setting(False, "one wide factor for all (Polyhistor-Lite)")
    stored: bool = setting(False, "plain adapters of one task, as :meth:`lifecycle` makes them")

    def __post_init__(self) -> None:
        if min(self.tasks, self.embedding, self.rank, self.reduction) < 1:
            raise RecipeError(f"{self}: expected tasks, embedding, rank, reduction from 1")

    def keys(self) -> Mapping[str, Key]:
        return {} if self.stored else self.context

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        sites = found(anatomy, [*attention_ends(anatomy), *mlp_ends(anatomy)], self,
                      "attention or MLP")
        if not self.stored:
            samples_first(anatomy, self)
        d = min(s.width for s in sites)
        m = max(1, d // self.reduction)
        if odd := next((s for s in sites if s.width % d), None):
            raise RecipeError(f"polyhistor: {odd.path} is {odd.width} wide, no multiple of the "
                              f"narrowest, {d}; narrow it with targets")
        templates: Templates | None = None
        for s in sites:
            if self.stored:
                yield Branch(s.path, stored(d, m, s.width // d))
                continue
            first = templates is None
            templates = templates or Templates(self.tasks, self.embedding, d, m, self.rank,
                                               self.lite)
            yield Branch(s.path, Decomposed(templates, s.width // d, first))

    def lifecycle(self, tuned: Any, task: int, name: str) -> None:
        """Generate one task's adapters once, as a plain adapter `name` beside the one in use (which
        must train this method), and use it: it needs no ``task``, and saves like any other. Raises
        RecipeError for a task that is none."""
        if not 0 <= task < self.tasks:
            raise RecipeError(f"polyhistor has tasks 0 to {self.tasks - 1}, not {task}")
        made = {path: m.plain(task).state_dict() for path, m in tuned.branches(Decomposed)}
        beside(tuned, self, name, [(replace(self, stored=True), made)])

    def count(self, d: int, times: int = 1) -> int:
        """Trainable parameters of a site of `times` the narrowest width d; what all share is held
        by the first."""
        return 2 * times * times

    def generators(self, d: int) -> int:
        """Trainable parameters that all sites share, where d is the narrowest width."""
        m = max(1, d // self.reduction)
        made = 2 * self.embedding * self.rank * m + (
            d * self.rank if self.lite else 2 * self.embedding * self.rank * d)
        return made + self.tasks * self.embedding
