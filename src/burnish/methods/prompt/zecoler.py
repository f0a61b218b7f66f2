from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.state.pseudo import PromptEncoder, Spelt, Standing
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ._stacks import embedding_stacks
from .prompt_tuning import Front, PromptTuning

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Zecoler(Method):
    """Zecoler: pseudo-tokens in a template around code, made by a recurrent encoder (P-tuning).

        x = [P_1 ..] code_1 [P ..] code_2 [P ..] [MASK]
        P = W_2 ReLU(W_1 [forward; backward] + b_1) + b_2

    forward, backward: of an LSTM of two layers over Q (length, d), in both directions, `hidden`
    wide each (0: d, as published). The text has the token `placeholder` where a pseudo-token
    stands, `length` of them a sample, the k-th of which reads P_k (an id that means nothing else;
    masks and positions are the text's). Without `placeholder` P stands in front, as in
    `prompt_tuning`. With ``made_by="none"`` the rows train themselves.

    A task is a word at the mask: ``tuned.step(batch, loss)`` with the cross-entropy of the logits
    of "yes" and "no" there. As published the language model trains too (``full + zecoler``, 1e-5)
    on one programming language and is asked about others; ``zecoler`` alone leaves it frozen (our
    option). Truncation must not take the mask: samples that lack a placeholder are refused.

    Start: Q ~ N(0, 0.02^2), the encoder as torch's LSTM and linears: not the pre-trained function.
    Trains length d + 8 h (d + h + 1) + 8 h (3 h + 1) + 2 h d + d + d (d + 1), h = hidden or d;
    ``made_by="none"``: length d. A finished file (``tuned.save``) holds P alone, a checkpoint of a
    run all of it. Kept for backward: what frozen blocks keep. Not mergeable.

    CodePrompt, the other method of these prompts, pools the mask's states of several layers: see
    `codeprompt`.
    """

    paper: ClassVar[str] = ("Zero-Shot Code Representation Learning via Prompt Tuning (2024), "
                            "arXiv:2404.08947; GPT Understands, Too (2021), arXiv:2103.10385")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    length: int = setting(10, "rows of P", alias=("num_virtual_tokens",))
    hidden: int = setting(0, "width of each direction of the LSTM; 0: the embeddings'",
                          alias=("encoder_hidden_size",), other=(8,))
    made_by: Literal["lstm", "none"] = setting("lstm", "what makes the rows")
    placeholder: int | None = setting(
        None, "token id that stands for a pseudo-token; None: P stands in front",
        unseen="a text without it is refused: tests/methods/test_zecoler.py")

    def __post_init__(self) -> None:
        if self.length < 1 or self.hidden < 0:
            raise RecipeError(f"zecoler: at least one row and a width of at least 0 are expected, "
                              f"got length={self.length} and hidden={self.hidden}")
        if self.hidden and self.made_by == "none":
            raise RecipeError("zecoler: hidden is the width of the LSTM, and made_by='none' has "
                              "none; leave one of them out")

    def prompt(self, anatomy: Anatomy) -> Any:
        if self.targets is not None:
            raise RecipeError("zecoler takes no targets: its rows stand in the text")
        if self.placeholder is not None:
            return self
        return Front(self)                           # type: ignore[arg-type]

    def start(self, table: Tensor) -> Tensor:
        """Q, or P itself, for this embedding table."""
        return torch.randn(self.length, table.shape[1], device=table.device) * 0.02

    def beside(self, width: int) -> tuple[None, PromptEncoder | None]:
        """(nothing, what makes P of Q)."""
        return None, None if self.made_by == "none" else PromptEncoder(width, self.hidden or width)

    #: what puts the rows before the input, as there
    listener = PromptTuning.listener

    def install(self, attacher: Any, part: Method) -> None:
        model = attacher.model
        paths = list(dict.fromkeys(embedding_stacks(attacher.anatomy).values()))
        if not paths:
            raise RecipeError("zecoler needs a model that takes inputs_embeds; "
                              f"{type(model).__name__} does not")
        table = model.get_submodule(paths[0]).get_input_embeddings()
        if not 0 <= self.placeholder < len(table.weight):        # type: ignore[operator]
            raise RecipeError(f"zecoler(placeholder={self.placeholder}): expected an id from 0 to "
                              f"{len(table.weight) - 1}")
        where = next(n for n, m in model.named_modules() if m is table)
        rows, (_, maker) = self.start(table.weight), self.beside(table.weight.shape[1])
        Standing(attacher.state, attacher.adapter.name, rows, maker and maker.to(rows.device),
                 self.placeholder, apart=len(paths) > 1).listen(attacher.slot(where), part.name)
        Spelt(attacher.state, attacher.adapter.name).listen(attacher.slot(""), f"{part.name}_ids")

    def finished(self) -> Zecoler:
        return replace(self, made_by="none", hidden=0)

    def count(self, d: int) -> int:
        """Trainable parameters at embedding width d."""
        h, rows = self.hidden or d, self.length * d
        if self.made_by == "none":
            return rows
        return rows + 8 * h * (d + h + 1) + 8 * h * (3 * h + 1) + 2 * h * d + d + d * (d + 1)
