from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.state.taps import evaluating
from ...blocks.state.templates import beside, only_at, scores, through, written
from ...core.call import given_to
from ...core.errors import ConfigError
from ...core.families import positions_of
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.outputs import next_token, vocabulary_head
from ..prompt._stacks import above

Ids = tuple[tuple[int, ...], ...] | list[list[int]]
#: keys of a batch that are written anew, and the answer
TEXT = ("input_ids", "attention_mask", "token_type_ids", "labels")


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

    batch: ``input_ids``, ``attention_mask``, ``token_type_ids`` and what parts of the recipe read
    (``task``); ``labels`` (B,) for a step. A template is put before a text's last token (its
    separator), in the segment of that. With `attack` a second term trains against the
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
               ) -> tuple[dict[str, Any], Tensor, nn.Module, Sequence[Sequence[int]]]:
        """(what the model is given, where the masks are, the body, the words)."""
        model = tuned.model
        if not self.templates or not self.label_words:
            raise ConfigError("mvp needs templates=... and label_words=...: token ids, the mask "
                              "among those of a template")
        body = above(tuned.anatomy, next(iter(tuned.anatomy.stacks()), ""), "input_ids",
                     "inputs_embeds")
        config = getattr(model, "config", None)
        if not body or next_token(model) or vocabulary_head(tuned.anatomy) is None \
                or getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"mvp reads the word at a mask, and {type(model).__name__} has no "
                              "head that fills one in: take a ...ForMaskedLM")
        said = {**given_to(tuned.state), **batch}
        read = {k: self._rows(said[k], r.key, len(batch["input_ids"]))
                for keys in tuned.state.context.values() for k, r in keys.items() if k in said}
        if other := [k for k in batch if k not in TEXT and k not in read]:
            raise ConfigError(f"mvp writes texts anew, and does not know what becomes of "
                              f"{', '.join(other)} then: a batch has {', '.join(TEXT)} and what "
                              "parts of the recipe read")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        tokens, seen, where = written(ids, mask, self.templates,
                                      self.mask_token,                   # type: ignore[arg-type]
                                      getattr(config, "pad_token_id", None) or 0)
        given = {"input_ids": tokens, "attention_mask": seen}
        if batch.get("token_type_ids") is not None:
            given["token_type_ids"] = beside(batch["token_type_ids"], mask, self.templates)
        most, hard = positions_of(model) or (0, False)
        if hard and tokens.shape[1] > most:
            if (long := int(seen.sum(1).max())) > most:
                room = most - max(map(len, self.templates))
                raise ConfigError(f"mvp: {type(model).__name__} has {most} positions, and a text "
                                  f"in its template has {long} tokens: cut texts to {room} with "
                                  "their separators")
            given = {k: v[:, :most] for k, v in given.items()}
        return {**given, **read}, where, model.get_submodule(body), self.label_words

    def _rows(self, value: Any, key: Key, samples: int) -> Any:
        """A key's entries for all rows: of each sample in every template, or one for all."""
        value = torch.as_tensor(value)
        if value.dim() == len(key.shape) or len(value) != samples:
            return value
        return value.repeat(len(self.templates or ()), *[1] * (value.dim() - 1))

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
            around = tuned.timeline.around()
            if names := [n for n, h in tuned.timeline.handlers if h in around]:
                raise ConfigError(f"mvp(attack=...) makes two forwards of a step, and {names[0]} "
                                  "stands around a step of one, which it may repeat; leave attack "
                                  f"or {names[0]} out")
            with through(table, heard):
                return tuned.step(given, both)
