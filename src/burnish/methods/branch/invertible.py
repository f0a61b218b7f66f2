from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bottleneck import activation
from ...blocks.state.coupling import Again, Coupling
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import token_tables
from ...core.outputs import vocabulary_head
from ...core.site import Branch

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Invertible(Method):
    """Invertible adapter: token embeddings pass a map that the output embedding sees undone.

    e (d) of a token, in halves: ``o1 = e1 + F(e2)``, ``o2 = e2 + G(o1)``, F and G ``d/2 -> w ->
    d/2`` with an activation between, w = d / 2 / `reduction`. Before the output embedding (a
    language model's head) stands its inverse with the same F and G: ``e2 = o2 - G(o1)``, ``e1 = o1
    - F(e2)``; where the model has no such head (a classifier), or with ``inverse=False``, only the
    first. It keeps volumes: log |det| = 0. With `pfeiffer` it is a language adapter (MAD-X; preset
    `mad_x`), trained as a language model; then a task adapter is stacked on it while it rests
    (``tuned.use({"language": 1, "task": 1}, train="task")``), and another language's exchanged. Of
    two in use the second is undone first; at a weight other than 1 none could be, and is refused.

    Start: normal weights of deviation 0.02 ("bert", the library's), near the pre-trained function;
    "zero" is exactly on it. Trains 2 (2 w d/2 + w + d/2): 296,064 at d = 768. Kept for backward: e,
    and what the inverse reads. Not mergeable. d is even.

    Reading: it stands at the table itself, on both sides of what is tied (AdapterHub's stands
    behind BERT's embedding norm); of a table that several stacks read, at each. Made for heads tied
    to the table; before an untied one the inverse is as free as any map.
    """

    paper: ClassVar[str] = ("MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual "
                            "Transfer (2020), arXiv:2005.00052; Small Models, Big Impact (2025)")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"token table"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    excused: ClassVar[dict[str, str]] = {
        "bf16_is_near_fp32 on clip":
            "by chance: what two short texts have in common cancels in a contrast of them, and the "
            "rest is near bf16's rounding; tests/methods/test_invertible.py holds it in fp64"}

    reduction: int = setting(2, "half the width over the narrow one")
    act: str = setting("relu", "activation inside", other=("gelu",))
    inverse: bool = setting(True, "undo it before the output embedding, where there is one")
    init: Literal["bert", "truncated", "zero"] = setting("bert", "start of the weights")

    def __post_init__(self) -> None:
        activation(self.act)
        if self.reduction < 1:
            raise RecipeError("invertible: reduction is at least 1")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        tables = token_tables(anatomy)
        for table in tables if len(tables) == 1 else ():
            if table.out % 2:
                raise RecipeError(f"invertible: {table.path} has {table.out} channels, which do "
                                  "not fall into two halves")
            ends = anatomy.ends(table)
            if anatomy.tied(table) and not ends:
                raise RecipeError(f"invertible: {table.name} is read past its module, where "
                                  "nothing can stand behind it")
            made = Coupling(table.out, max(1, table.out // 2 // self.reduction), self.act,
                            self.init)
            yield Branch(table.path, made, compose="replace")
            for end in ends:
                if end.kind == "embedding":
                    yield Branch(end.path, Again(made, back=False), compose="replace")
            if self.inverse and (head := vocabulary_head(anatomy)) is not None:
                yield Branch(head, Again(made, back=True), compose="replace", at="input",
                             undoes=True)

    def count(self, d: int) -> int:
        """Trainable parameters behind a table of width d."""
        return Coupling.count(d, max(1, d // 2 // self.reduction))
