from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.choose.attended import mass, rows
from ...blocks.state.attending import open_attentions, watched
from ...blocks.state.taps import evaluating
from ...core.anatomy import Anatomy
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import untargeted


@dataclass(frozen=True, kw_only=True)
class Conditional(Method):
    """Conditional instruction tuning: answers that lean on what the user gave are told apart.

    Tuning on instructions makes a model look away from the text it was given. A seed model, the
    base tuned briefly, says of each response how far it looked there::

        s = mean over tokens t of the response of max over heads h of sum over j of A_h[t, j]

    j the tokens of user turns, A the attention of block `layer` (of the middle one where nobody
    says: unconfirmed), user turns all those before the response, without what the template writes.
    Where s > beta (threshold unconfirmed) an `indicator` goes behind the user turn that is
    answered. Tuning is plain tuning on these rows; afterwards the indicator is written where an
    answer has to come out of the text, and left out elsewhere. `burnish mark` does so with a file,
    and by hand::

        part = burnish.parse("conditional(beta=0.6)")[0]
        scores = part.lifecycle(model, texts)           # a (turns,) tensor for each text

    texts: mappings of one text each: ``input_ids`` (1, T) and whatever else the model is called
    with, ``user`` and ``response`` (turns, T), true at the tokens meant. Trains nothing. Costs a
    forward a text, and of its attention the rows of responses in one block. Needs attention that
    `F.scaled_dot_product_attention` computes.

    When to use: question answering over documents, summaries, retrieval, after tuning on mixed
    instructions. When not: data that are all of one kind (every row gets the indicator, or none).
    """

    paper: ClassVar[str] = ("On the Loss of Context-awareness in General Instruction Fine-tuning "
                            "(2024), arXiv:2411.02688")
    tier: ClassVar[str] = "checked against an independent equation"

    beta: float = setting(0.6, "score above which a response leans on its context")
    indicator: str = setting("[use the text above]", "what goes behind the user's words")
    layer: int | None = setting(None, "block that is looked at, from 0; None: the middle")

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"conditional: beta is from 0 to 1, got {self.beta:g}")
        if not self.indicator.strip():
            raise ConfigError("conditional: the indicator is empty, so nothing would be indicated")
        untargeted(self, "what is looked at is one block's attention")

    @torch.no_grad()
    def lifecycle(self, model: nn.Module, texts: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """Scores from 0 to 1, one of each response of each text."""
        path = self._path(model)
        found = []
        with evaluating(list(model.modules())):
            for text in texts:
                found.append(self._scores(model, path, text))
        return found

    def _scores(self, model: nn.Module, path: str, text: Mapping[str, Any]) -> Tensor:
        user, response = (torch.as_tensor(text[k]).bool() for k in ("user", "response"))
        if user.shape != response.shape or user.dim() != 2 or not bool(response.any(1).all()):
            raise ConfigError(f"conditional: user {tuple(user.shape)} and response "
                              f"{tuple(response.shape)} mark tokens of the same turns, each with "
                              "some of a response")
        at = response.any(0).nonzero()[:, 0]
        seen: list[Tensor] = []
        with watched(model, [path], lambda _, given: seen.append(
                rows(given, at.to(given["query"].device)).cpu())):
            model(**{k: v for k, v in text.items() if k not in ("user", "response")})
        if len(seen) != 1:
            raise ConfigError(f"conditional: {path} computed its attention {len(seen)} times in a "
                              "forward, and once is expected; load the model with "
                              "attn_implementation='sdpa'")
        return torch.stack([mass(seen[0][:, asked[at]], given).mean()
                            for given, asked in zip(user, response, strict=True)])

    def _path(self, model: nn.Module) -> str:
        paths = open_attentions(Anatomy.of(model), "conditional")
        at = len(paths) // 2 if self.layer is None else self.layer
        if not 0 <= at < len(paths):
            raise ConfigError(f"conditional: layer={at}: this model has blocks 0 to "
                              f"{len(paths) - 1}")
        return paths[at]
