"""Masked language models that answer: a prompt is read, its answer stands behind the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.errors import DataError
from ..rows import Rows
from .base import Batch
from .masked import MaskedLanguageModelling


class Hidden(Rows):
    """Prompts with a mask for every token of their answer: where the prompt has the mask, else
    behind it. Rows longer than `max_length` are left out."""

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None):
        self.notes: list[str] = []
        self.coded: list[dict[str, list[int]]] = []
        self.sources: list[int] = []
        mask = tokenizer.mask_token
        added = tokenizer.added_tokens_decoder.get(tokenizer.mask_token_id)
        space = " " if getattr(added, "lstrip", False) else ""    # the mask takes it to itself
        asked, said = rows["prompt"][:], rows["completion"][:]
        for i, (prompt, answer) in enumerate(zip(asked, said, strict=True)):
            wanted = tokenizer(f"{space}{answer.strip()}", add_special_tokens=False)["input_ids"]
            if not wanted or prompt.count(mask) > 1 or tokenizer.mask_token_id in wanted:
                raise DataError(f"row {i}: expected an answer of at least one token, and a prompt "
                                f"with {mask} once, where the answer belongs, or not at all; got "
                                f"{prompt[:60]!r} and {answer[:40]!r}")
            made = dict(tokenizer(behind(prompt, mask, len(wanted))))
            ids = torch.tensor(made["input_ids"])
            labels = torch.full_like(ids, -100)
            labels[ids == tokenizer.mask_token_id] = torch.tensor(wanted)
            if max_length is None or len(ids) <= max_length:
                self.coded.append({**made, "labels": labels.tolist()})
                self.sources.append(i)
        if lost := len(asked) - len(self.coded):
            self.notes.append(f"{lost} of {len(asked)} rows are longer than "
                              f"max_length={max_length} and are left out")
        if not self.coded:
            raise DataError(f"no row fits into max_length={max_length} tokens; raise it")

    def __len__(self) -> int:
        return len(self.coded)

    def length(self, i: int) -> int:
        return len(self.coded[i]["input_ids"])

    def row(self, i: int) -> dict[str, Any]:
        return dict(self.coded[i])

    def source(self, i: int) -> int:
        return self.sources[i]


def behind(prompt: str, mask: str, length: int = 1) -> str:
    """The prompt with so many masks where its one mask is, or at its end."""
    masks = mask * length
    return prompt.replace(mask, masks) if mask in prompt else f"{prompt.rstrip()} {masks}"


class MaskedInstructionTuning(MaskedLanguageModelling):
    """``input_ids``, ``attention_mask``, ``labels`` (B, T): a prompt with masks for the tokens of
    its answer, which alone are learnt, all at once.

    So a masked language model follows instructions ("It's All in The [MASK]": Clavie et al., 2025,
    from the text). Left out: their share of rows whose masks hide something else.
    """

    unlike = True
    usual_length = None
    metric = "accuracy"
    greater_is_better = True

    def make(self, split: str) -> Rows:
        made = Hidden(self.data.splits[split], self.processor, self.max_length)
        self.tell(split, made.notes)
        return made

    def singly(self, split: str) -> Rows:
        return self.rows(split)

    def check(self, model: Any) -> None:
        super(MaskedLanguageModelling, self).check(model)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """Answers with every token right, and tokens."""
        said, true = torch.as_tensor(answers), torch.as_tensor(labels)
        whole = ((said == true) | (true == -100)).all(-1)
        return {"accuracy": whole.double().mean().item(), **super().measure(answers, labels)}

    def encode(self, row: Mapping[str, Any]) -> Batch:
        mask = self.processor.mask_token
        return super().encode({"text": row["text"] if mask in row["text"]
                               else behind(row["text"], mask)})

    def answer(self, model: Any, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """The likeliest token behind every mask of the text; behind its end where it has none."""
        asked = self.encode(row)
        hidden = (asked["input_ids"][0] == self.processor.mask_token_id).nonzero().flatten()
        share = self.logits(model(**asked))[0, hidden].float().softmax(-1)
        best, ids = share.max(-1)
        return {"text": self.processor.decode(ids).strip(),
                "probability": float(best.double().prod())}
