from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.tokens import Tokens
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Trainable tokens: the embeddings of a few tokens train, those of all others stay.

    ``E'[id_k] = E[id_k] + rows_k``, rows (n, width), one for each id of `ids`: words that were
    added to the vocabulary, or that are to mean something else. The table is never written.

    Start: rows = 0, the pre-trained function exactly. Trains n width per table. Kept for backward:
    the ids of the batch. Merges exactly. No weight decay. The row of a padding id gets no
    gradient, as in the table. Where the table is tied to other modules (the head of a language
    model, the tables of an encoder and its decoder) they read the same rows: at a head
    ``logits[id_k] += x . rows_k``, which keeps x. There a padding id has its gradient.
    """

    paper: ClassVar[str] = "trainable tokens of huggingface/peft"
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding"})
    needs: ClassVar[frozenset[str]] = frozenset({"tables"})
    ties: ClassVar[bool] = True
    excused: ClassVar[dict[str, str]] = {
        "every_kind_of_place": "it stands on tables alone: tests/methods/test_trainable_tokens.py"}
    small: ClassVar[dict[str, tuple[int, ...]]] = {"ids": tuple(range(1, 48))}

    targets: str | list[str] | tuple[str, ...] | None = setting(
        "embedding", "which tables, text or a list; as it is the longest", other=("embedding",))
    ids: tuple[int, ...] | list[int] = setting((0,), "tokens whose embeddings train",
                                               alias=("token_indices",), other=((1, 2),))

    def __post_init__(self) -> None:
        ids = list(self.ids) if isinstance(self.ids, tuple | list) else []
        if not ids or len(set(ids)) < len(ids) or not all(type(i) is int and i >= 0 for i in ids):
            raise RecipeError(f"trainable_tokens: ids={self.ids!r}: expected whole numbers from 0, "
                              "each once")

    def delta(self, site: Site) -> Tokens | None:
        tables = [p.inp for p in site.places]
        if self.targets == "embedding" and tables and site.place.inp < max(tables):
            return None                          # of positions, of segments
        if (most := max(self.ids)) >= site.place.inp:
            raise RecipeError(f"trainable_tokens: {site.place.name} has {site.place.inp} rows, so "
                              f"no token {most}; resize the table first "
                              f"(model.resize_token_embeddings({most + 1}))")
        return Tokens(site.place, self.ids)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward: none but its id."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one table."""
        return len(self.ids) * place.out
