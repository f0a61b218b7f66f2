from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.placed import Words
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, towers, unmet

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

#: ids of words, or of the tokens that each of them is made of
Ids = tuple[int, ...] | list[int]


@dataclass(frozen=True, kw_only=True)
class Csp(Method):
    """CSP: attributes and objects as words of a learned vocabulary, which compose to classes.

    A text is "a photo of [a][o]", one token for an attribute and one for an object; in the place of
    the embeddings of the tokens `ids` stand rows theta (n, d), wherever a text has them. Pairs are
    classes, ``p(a, o | x)`` the softmax of the model's own logits over those that are given; pairs
    that were never seen are read from the same rows, and cost nothing more. Where a word is several
    tokens its text has one of `ids` for it (any token that texts have no other use for), and
    `spelt` says what it begins from: the mean of these. Texts keep their length and end.

    Start: theta the embeddings of the ids (or those means): the pre-trained function exactly, where
    no mean is asked for. Trains n d: 276,480 for the 115 attributes and 245 objects of MIT-States
    at d = 768. Kept for backward: the text tower's, for all pairs that are given: checkpoint beside
    it where they are many. Not mergeable under dropout, which acts on theta in training, a word
    alike in all texts; ``trainable_tokens`` is the same without it, and merges.

    Without weight decay, where the authors have 1e-5 to 5e-5. An open world (which pairs are
    possible at all) and a bias for unseen pairs are of the scoring, and not here.
    """

    paper: ClassVar[str] = ("Learning to Compose Soft Prompts for Compositional Zero-Shot Learning "
                            "(2023), arXiv:2204.03574")
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"two towers"})
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"ids": tuple(range(1, 48))}

    ids: Ids | None = setting(None, "tokens that stand for words: they have to be named",
                              other=((1, 2),))
    spelt: tuple[Ids, ...] | list[Ids] | None = setting(
        None, "tokens whose mean starts each word; None: its own", other=(((1, 2),) * 47,))
    dropout: float = setting(0.3, "dropout on the words")

    def __post_init__(self) -> None:
        ids = list(self.ids) if isinstance(self.ids, tuple | list) else []
        if self.ids is not None and (not ids or len(set(ids)) < len(ids)
                                     or not all(type(i) is int and i >= 0 for i in ids)):
            raise RecipeError(f"csp: ids={self.ids!r}: expected whole numbers from 0, each once")
        if self.spelt is not None and (len(self.spelt) != len(ids) or not all(self.spelt)):
            raise RecipeError(f"csp: {len(ids)} ids, and spellings of {len(self.spelt)}: expected "
                              "the tokens of each, one at least")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"csp(dropout={self.dropout}): expected 0 or more, and below 1")

    def prompt(self, anatomy: Anatomy) -> Csp:
        if self.targets is not None:
            raise RecipeError("csp takes no targets: it stands at the table of the text tower")
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        if self.ids is None:
            raise RecipeError("csp trains words, and none is named: csp(ids=[...]), the tokens "
                              "that stand for attributes and objects in its texts")
        return self

    def install(self, attacher: Any, part: Method) -> None:
        path = towers(attacher.anatomy).table
        rows = self.start(attacher.model.get_submodule(path).weight)
        Words(attacher.state, attacher.adapter.name, self.ids, rows, self.dropout).to(
            attacher.device(path)).listen(attacher.slot(path), part.name)

    def start(self, table: Tensor) -> Tensor:
        """theta from the table of embeddings."""
        made = self.spelt or [(i,) for i in self.ids]
        most = max(i for word in (self.ids, *made) for i in word)
        if most >= len(table) or min(i for word in made for i in word) < 0:
            raise RecipeError(f"csp: the table has tokens 0 to {len(table) - 1}, so none is {most}")
        return torch.stack([table.detach()[list(word)].float().mean(0) for word in made])

    def count(self, d: int) -> int:
        """Trainable parameters at text width d."""
        return len(self.ids) * d
