from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.state.taps import evaluating
from ...blocks.state.templates import only_at, scores, through, written
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.outputs import next_token, vocabulary_head
from ..prompt._stacks import above

Ids = tuple[tuple[int, ...], ...] | list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Mvp(Method):
    """MVP: a masked language model is tuned as a classifier through words, without a head.

    Each text stands in M `templates`, ``[x; template_m with the mask]``; class c has a few
    `label_words` of one token each, and

        s_c = mean over templates and words of c of the logit at the mask,   p = softmax(s)

    with the cross-entropy of p. No parameter is new, so before training the model answers as it
    does unseen; whatever the recipe trains is tuned (all weights as published)::

        method = Mvp(templates=..., label_words=..., mask_token=tokenizer.mask_token_id)
        tuned = burnish.tune(model, "full")                  # a ...ForMaskedLM
        tuned.optimizer(lr=1e-5)
        method.step(tuned, batch)                            # through tuned.step
        method.lifecycle(tuned, batch)                       # (B, C) scores of new texts

    batch: ``input_ids``, ``attention_mask``, and ``labels`` (B,) for a step. A template is put
    before a text's last token (its separator). With `attack` a second term trains against the
    worst small change: the loss where the word embeddings of every row are moved by ``attack g /
    ||g||``, g their gradient (AT; 1 as published).

    Takes M forwards, as one batch of M B rows; the head sees the mask's states alone, so logits of
    V words exist for M B tokens. AT takes a forward and a backward to the embeddings more. Logits
    are averaged, not probabilities. A word of several tokens has no logit of its own: give one.
    """

    paper: ClassVar[str] = ("Model-tuning Via Prompts Makes NLP Models Adversarially Robust, "
                            "EMNLP 2023, arXiv:2303.07320")
    tier: ClassVar[str] = "checked against an independent equation"

    templates: Ids | None = setting(None, "token ids of each, the mask among them")
    label_words: Ids | None = setting(None, "of each class, the token ids of its words")
    mask_token: int | None = setting(None, "token id of the mask", alias=("mask_token_id",))
    attack: float = setting(0.0, "how far embeddings are moved against the loss; 0: not")

    def __post_init__(self) -> None:
        for template in self.templates or ():
            if list(template).count(self.mask_token) != 1:        # type: ignore[arg-type]
                raise ConfigError(f"mvp: every template has the mask ({self.mask_token}) once, "
                                  f"unlike {tuple(template)}")
        if self.label_words is not None and (len(self.label_words) < 2 or not all(
                len(w) and all(isinstance(i, int) for i in w) for w in self.label_words)):
            raise ConfigError("mvp: words are given for two classes or more, a token id each (no "
                              f"answer of several tokens), got {self.label_words}")
        if self.attack < 0:
            raise ConfigError(f"mvp: attack is a length of at least 0, got {self.attack:g}")

    def _asked(self, tuned: Any, batch: Mapping[str, Any]
               ) -> tuple[dict[str, Tensor], Tensor, nn.Module, Sequence[Sequence[int]]]:
        """(what the model is given, where the masks are, the body, the words)."""
        model = tuned.model
        if not self.templates or not self.label_words:
            raise ConfigError("mvp needs templates=... and label_words=...: token ids, the mask "
                              "among those of a template")
        body = above(tuned.anatomy, next(iter(tuned.anatomy.stacks()), ""), "input_ids",
                     "inputs_embeds")
        if not body or next_token(model) or vocabulary_head(tuned.anatomy) is None:
            raise ConfigError(f"mvp reads the word at a mask, and {type(model).__name__} has no "
                              "head that fills one in: take a ...ForMaskedLM")
        ids, config = batch["input_ids"], getattr(model, "config", None)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        tokens, seen, where = written(ids, mask, self.templates, int(self.mask_token or 0),
                                      getattr(config, "pad_token_id", None) or 0)
        return ({"input_ids": tokens, "attention_mask": seen}, where, model.get_submodule(body),
                self.label_words)

    def lifecycle(self, tuned: Any, batch: Mapping[str, Any]) -> Tensor:
        """(B, C) scores of texts; softmax makes them probabilities."""
        given, where, body, words = self._asked(tuned, batch)
        still = evaluating([m for m in tuned.model.modules() if m.training])
        with still, torch.no_grad(), only_at(body, where):
            return scores(tuned.model(**given).logits[:, 0], words, len(self.templates or ()))

    def step(self, tuned: Any, batch: Mapping[str, Any]) -> Tensor:
        """One training step on texts and their ``labels``; the loss, with AT's term where it is
        asked for."""
        given, where, body, words = self._asked(tuned, batch)
        table, M, labels = body.get_input_embeddings(), len(self.templates or ()), batch["labels"]
        at: list[Tensor] = []

        def told(out: Any) -> Tensor:
            z = scores(out.logits[:, 0], words, M)
            return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), labels)

        def heard(e: Tensor) -> Tensor:
            if not at:                               # of the first forward
                at.append(e if e.requires_grad else e.detach().requires_grad_())
                return at[0]
            return e

        def both(out: Any, _: Any) -> Tensor:
            clean = told(out)
            (g,) = torch.autograd.grad(clean, at[0], retain_graph=True)
            size = g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1)
            with through(table, lambda e: e + self.attack * g / size):
                return clean + told(tuned.model(**given))

        with only_at(body, where):
            if not self.attack:
                return tuned.step(given, lambda out, _: told(out))
            optimizer = tuned.current_optimizer or tuned.optimizer()
            if getattr(optimizer, "zeroth_order", False) or any(
                    "objective" in m.axes() for m in tuned.recipe):
                raise ConfigError("mvp(attack=...) makes a second forward along a gradient: it "
                                  "goes with no zeroth-order steps and no objectives; leave "
                                  "attack out")
            with through(table, heard):
                return tuned.step(given, both)
