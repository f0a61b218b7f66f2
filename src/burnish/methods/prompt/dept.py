from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ...blocks.state.prompts import Positioned
from ...core.errors import RecipeError
from ...core.method import setting
from .prompt_tuning import PromptTuning


@dataclass(frozen=True, kw_only=True)
class Dept(PromptTuning):
    """DePT: a short prompt, and a low-rank edit of the embeddings behind it.

    ``X' = [P; E(x) + A B]``, P (length, d), A (edited, rank), B (rank, d): row i of A B is added to
    the i-th token of the text, whatever token that is. Padding has no row and moves none, on either
    side; tokens behind the last row stay as they are, so texts may be longer, and generation goes
    on. All else is `prompt_tuning`'s: mask, positions, cache, encoder-decoders.

    Start: P as in `prompt_tuning`, A N(0, 0.02^2), B = 0: a prompt of this length. Trains
    length d + rank (edited + d), as many as a prompt of 100 rows has at d = 768, 256 tokens (76,800
    with the defaults), over 60 tokens less. Kept for backward: what frozen blocks keep for `length`
    more tokens, and rank numbers per token. Not mergeable: the edit goes by places, not by words.

    The prompt's learning rate is the run's (the authors: 0.3 to 0.5), A and B have `edit_rate` of
    it (theirs: 1e-4 to 5e-3 in all). `edited` is the longest text that is edited whole.
    """

    paper: ClassVar[str] = ("DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning "
                            "(2024), arXiv:2309.05173")
    tier: ClassVar[str] = "checked against the paper's numbers"

    length: int = setting(40, "rows of P", alias=("num_virtual_tokens",))
    rank: int = setting(45, "rank of the edit")
    edited: int = setting(256, "places of a text that have a row of the edit", other=(4,))
    edit_rate: float = setting(1e-3, "learning rate of A and B over that of P")

    def __post_init__(self) -> None:
        if min(self.rank, self.edited) < 1 or self.edit_rate <= 0:
            raise RecipeError(f"{self.name}(rank={self.rank}, edited={self.edited}, edit_rate="
                              f"{self.edit_rate}): expected an edit of at least one token and "
                              "rank 1, and a rate above 0")

    def beside(self, width: int) -> tuple[Positioned | None, nn.Module | None]:
        edit = Positioned(self.edited, self.rank, width)
        for p in edit.parameters():
            p.burnish_lr = self.edit_rate                # type: ignore[attr-defined]
        return edit, None

    def count(self, d: int) -> int:
        """Trainable parameters at embedding width d."""
        return self.length * d + self.rank * (self.edited + d)
