from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.templates import filled
from ...core.errors import ConfigError, FormatError
from ...core.method import setting
from .mvp import Mvp


@dataclass(frozen=True)
class Written:
    """Texts in their template with a word in place of the mask, (n, T) tokens and attention mask,
    and what they are written with."""

    tokens: Tensor
    mask: Tensor
    how: Mapping[str, Any]

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """As tensors and text, for a safetensors file: a pipeline goes on from here."""
        return {"tokens": self.tokens, "mask": self.mask}, {"pcp": json.dumps(self.how)}


@dataclass(frozen=True, kw_only=True)
class Pcp(Mvp):
    """PCP: go on pre-training on the task's own texts, each in its template with its label's word.

        1  step      the model is tuned through words at a mask on the few labels (as `mvp`)
        2  write     each unlabelled x gets ``y = argmax_c s_c(x)`` (or its gold label), and becomes
                     T(x, word(y)): in every template, the mask filled with the class's first word
        3  read      masked-language steps on these: a share `ratio` of all tokens, the word among
                     them, is asked for; 8 in 10 of those read as the mask, 1 as any token
        4  step      tuned through words again, from the new weights

    In that order, with a recipe each::

        method = Pcp(templates=..., label_words=..., mask_token=...,
                     special=tokenizer.all_special_ids)
        for batch in few: method.step(tuned, batch)
        rows = [method.write(tuned, batch) for batch in unlabelled]
        tuned.detach()                            # stage 3 begins from the pre-trained weights
        tuned = burnish.tune(model, "lora(rank=16)")
        for r in rows: method.read(tuned, r)
        tuned = burnish.tune(tuned.merge(), "full")        # a part that adds is merged before 4
        for batch in few: method.step(tuned, batch)

    ``rows.state()`` is a stage as a file and ``method.restored(...)`` reads it: one written with
    other templates, words or mask than this method's is refused, since stage 3 pays only where
    stage 4 asks as it read. No text of a test set belongs among the unlabelled ones. Which tokens
    read as what in stage 3 is the field's habit (unconfirmed).

    Published: RoBERTa-large, 16 labels a class; stage 3 at 1e-4 with 6 % warm-up and decay 0.01,
    100 epochs on small sets; stages 1 and 4 at 1e-5. With soft templates (DART) stage 1 and 4 are
    `zecoler`'s; here templates are hard.
    """

    paper: ClassVar[str] = ("Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful "
                            "Learner, NeurIPS 2023, arXiv:2305.01711")
    tier: ClassVar[str] = "from the text"

    ratio: float = setting(0.15, "share of the tokens that is asked for",
                           alias=("mlm_probability",))
    special: tuple[int, ...] | list[int] = setting((), "token ids that are never asked for")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"pcp: ratio is a share above 0 and up to 1, got {self.ratio:g}")

    def how(self) -> dict[str, Any]:
        """What texts are written with."""
        return {"templates": [list(t) for t in self.templates or ()],
                "label_words": [list(w) for w in self.label_words or ()],
                "mask_token": self.mask_token}

    def write(self, tuned: Any, batch: Mapping[str, Any],
              labels: Sequence[int] | Tensor | None = None) -> Written:
        """Texts in their templates with the words of what the model says (or of `labels`)."""
        given, where, _, words = self._asked(tuned, batch)
        if more := [k for k in given if k not in ("input_ids", "attention_mask")]:
            raise ConfigError(f"pcp: rows that are written are tokens and their mask, and the batch"
                              f" has {', '.join(more)} beside them")
        said = self.lifecycle(tuned, batch).argmax(1) if labels is None else \
            torch.as_tensor(labels, device=where.device)
        first = torch.tensor([w[0] for w in words], device=where.device)
        tokens = filled(given["input_ids"], where, first[said].repeat(len(self.templates or ())))
        return Written(tokens, given["attention_mask"], self.how())

    def asked(self, tuned: Any, rows: Written, generator: torch.Generator | None = None
              ) -> dict[str, Tensor]:
        """Rows with new masks, as a masked language model takes them."""
        self._same(rows.how)
        if self.mask_token is None:
            raise ConfigError("pcp needs mask_token=..., which stands where a token is asked for")
        tokens, device = rows.tokens, rows.tokens.device
        taken = rows.mask.bool() & ~torch.isin(tokens, tokens.new_tensor(list(self.special)))
        u = torch.rand(2, *tokens.shape, generator=generator, device=device)
        taken &= u[0] < self.ratio
        size = tuned.model.get_input_embeddings().num_embeddings
        other = torch.randint(size, tokens.shape, generator=generator, device=device)
        read = torch.where(taken & (u[1] < 0.8), self.mask_token, tokens)
        read = torch.where(taken & (u[1] >= 0.9), other, read)
        return {"input_ids": read, "attention_mask": rows.mask,
                "labels": torch.where(taken, tokens, -100)}

    def read(self, tuned: Any, rows: Written, generator: torch.Generator | None = None) -> Tensor:
        """One masked-language step on rows; the loss."""
        return tuned.step(self.asked(tuned, rows, generator))

    def restored(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
        """Rows from a file of theirs. FormatError for one that is none."""
        try:
            rows = Written(tensors["tokens"], tensors["mask"], json.loads(metadata["pcp"]))
        except (KeyError, ValueError) as e:
            raise FormatError(f"not a file of pcp's rows: {e}") from None
        self._same(rows.how)
        return rows

    def _same(self, how: Mapping[str, Any]) -> None:
        for key, value in self.how().items():
            if how.get(key) != value:
                raise ConfigError(f"pcp: these texts were written with {key}={how.get(key)}, and "
                                  f"the model is asked with {key}={value}: stages 2 to 4 need the "
                                  "same")
