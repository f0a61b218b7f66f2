"""From rows of a task to batches of a model, and from its answers to figures.

A :class:`Task` knows how to load a model for its data, how a row becomes tensors, how rows become
a batch, and what is measured. The four tasks differ in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.errors import ConfigError, DataError
from ..core.reading import plain
from ..formats.model_files import check_weights, loading
from ..formats.opened import opened_as, opens
from .data import Data
from .heads import resize_head
from .places import AUTO, check_local, check_served, check_there, processor_for
from .rows import Documents, Pictures, Rows, Sentences, Turns

Batch = dict[str, torch.Tensor]


@dataclass
class Task:
    """One way from rows to a loss. `processor` is the tokenizer or image processor."""

    data: Data
    processor: Any = None
    max_length: int | None = None
    notes: list[str] = field(default_factory=list)
    #: tensors of the loaded model that its files lack, or have in another size: drawn anew
    fresh: list[str] = field(default_factory=list)
    _made: dict[str, tuple[Any, Rows]] = field(default_factory=dict, repr=False)

    auto: ClassVar[str] = ""
    #: what best-checkpoint goes by, and whether more of it is better
    metric: ClassVar[str] = "loss"
    greater_is_better: ClassVar[bool] = False

    # -- the model -----------------------------------------------------------------------
    def load(self, name: str, trust_remote_code: bool = False, unread: bool = False, **kw: Any
             ) -> nn.Module:
        """The pre-trained model at `name`, with a head of the right width.

        unread: a folder's weights are left in its files, for a recipe to read one by one
            (formats/opened.py), where they can be.
        """
        import transformers

        check_local(name)
        check_served(self.data.task, name, trust_remote_code)
        auto = getattr(transformers, self.auto)
        with loading(name, f"the model for {self.data.task},"):
            if not trust_remote_code:
                check_weights(name, lambda: auto.from_config(
                    transformers.AutoConfig.from_pretrained(name)))
            try:
                if unread and not trust_remote_code and opens(name):
                    model, found = opened_as(auto, name, **self.head(), **kw)
                else:
                    model, found = auto.from_pretrained(
                        name, trust_remote_code=trust_remote_code, use_safetensors=True,
                        output_loading_info=True, **self.head(), **kw)
            except (OSError, ValueError) as e:
                raise ConfigError(f"{name} cannot be loaded for {self.data.task}: "
                                  f"{plain(str(e).strip().partition(chr(10))[0])}") from None
        changed = (k[0] if isinstance(k, tuple) else k for k in found["mismatched_keys"])
        self.fresh = sorted({*found["missing_keys"], *changed})
        return model

    def head(self) -> dict[str, Any]:
        return {}

    def fit_head(self, model: nn.Module) -> nn.Module:
        """Gives a model that is already here the right number of classes."""
        return model

    def settle(self, model: nn.Module) -> None:
        """Makes the model and what reads its data agree, before any row is read.

        Raises ConfigError where they cannot.
        """

    def check(self, model: nn.Module) -> None:
        """Looks through the rows for what the model cannot take. Raises DataError with the row."""

    # -- the rows ------------------------------------------------------------------------
    def rows(self, split: str) -> Rows:
        """The split as tensors; made once and kept."""
        source = self.data.splits[split]
        kept = self._made.get(split)
        if kept is None or kept[0] is not source:
            kept = self._made[split] = (source, self.make(split))
            kept[1].context = {k: source[k][:] for k in self.data.keys}
        return kept[1]

    def make(self, split: str) -> Rows:
        raise NotImplementedError

    def preview(self, n: int = 3) -> list[str]:
        """A few rows as people read them."""
        return self.data.samples(n)

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Rows as one batch, with the keys of context that they have."""
        keys = [k for k in self.data.keys if k in rows[0]]
        bare = [{k: v for k, v in r.items() if k not in keys} for r in rows] if keys else rows
        return self.together(bare) | {k: torch.tensor([r[k] for r in rows]) for k in keys}

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

    def example(self, batch_size: int, split: str = "train") -> Batch:
        """The costliest batch of a split's rows: what the memory must be planned for."""
        rows = self.rows(split)
        longest = sorted(range(len(rows)), key=rows.length, reverse=True)[:batch_size]
        return self.collate([rows[i] for i in longest])

    # -- models that are no transformers models --------------------------------------------
    def input(self, batch: Batch) -> torch.Tensor:
        """What a plain module is called with."""
        return batch["input_ids"]

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """The task's loss of a module's outputs."""
        return nn.functional.cross_entropy(logits_of(outputs), labels, label_smoothing=smoothing)

    def call(self, batch: Batch, plain: bool, smoothing: float = 0.0
             ) -> tuple[Any, Callable[[Any, Any], Any] | None]:
        """(batch, loss) as :meth:`burnish.Tuned.step`, simulate and measure take them."""
        if plain:
            return (self.input(batch), batch["labels"]), \
                lambda out, b: self.loss(out, b[1], smoothing)
        if smoothing:
            return batch, lambda out, b: self.loss(out, b["labels"], smoothing)
        return batch, None

    # -- the figures -----------------------------------------------------------------------
    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What of the model's answer is kept for the figures (evaluation holds all of it)."""
        return logits_of(logits).argmax(-1)

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """(rows, 2): per row the sum of -log p over what was asked, and how much was asked.

        Kept apart, so that the mean weighs every answer alike, however rows are batched.
        """
        logits = logits_of(logits).float()
        sums = nn.functional.cross_entropy(logits, labels, reduction="none")
        return torch.stack([sums, torch.ones_like(sums)], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        raise NotImplementedError

    def figures(self, answers: Any, losses: Any, labels: Any) -> dict[str, float]:
        """``loss``, the plain task loss per answer, and what :meth:`measure` finds beside it."""
        total, count = torch.as_tensor(losses).double().sum(0).tolist()
        return {"loss": total / max(count, 1.0), **self.measure(answers, labels)}


class _Classify(Task):
    metric = "accuracy"
    greater_is_better = True

    def head(self) -> dict[str, Any]:
        names = dict(enumerate(self.data.labels or ()))
        return {"num_labels": len(names), "id2label": names,
                "label2id": {v: k for k, v in names.items()}, "ignore_mismatched_sizes": True,
                "problem_type": "single_label_classification"}

    def fit_head(self, model: nn.Module) -> nn.Module:
        return resize_head(model, self.data.labels or ())

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        return classification(torch.as_tensor(answers), torch.as_tensor(labels),
                              len(self.data.labels or ()))


class ImageClassification(_Classify):
    """``pixel_values`` (B, C, H, W) and ``labels`` (B,)."""

    auto = AUTO["image-classification"]

    def input(self, batch: Batch) -> torch.Tensor:
        return batch["pixel_values"]

    def make(self, split: str) -> Rows:
        return Pictures(self.data.splits[split], self.processor, self.data.where.get(split))


class _Words(Task):
    """Tasks of text: one tokenizer, whose ids and lengths the model must follow."""

    #: tokens of a row where nobody says how many; None: as many as the row has
    usual_length: ClassVar[int | None] = None

    def load(self, name: str, trust_remote_code: bool = False, unread: bool = False, **kw: Any
             ) -> nn.Module:
        model = super().load(name, trust_remote_code, unread, **kw)
        self.settle(model)
        return model

    def settle(self, model: nn.Module) -> None:
        from . import words

        self.notes += words.agree(model, self.processor, self.stops())
        asked, limit = self.max_length, self.processor.model_max_length
        self.max_length, notes = words.longest(
            model, asked, limit if limit and limit < 10**9 else None)
        if asked is None and self.usual_length is not None:
            self.max_length = min(self.usual_length, self.max_length or self.usual_length)
        self.notes += notes

    def stops(self) -> list[int]:
        """Ids that end an answer, beside the end of text."""
        return []

    def check(self, model: nn.Module) -> None:
        from . import words

        known = words.words_of(model)
        if known is not None and len(self.processor) > known:
            for split in self.data.splits:
                words.check_words(self.rows(split), known, f"{self.data.source}, {split}")


class TextClassification(_Words, _Classify):
    """``input_ids``, ``attention_mask`` (B, T) padded to the longest row, ``labels`` (B,)."""

    auto = AUTO["text-classification"]

    def make(self, split: str) -> Rows:
        made = Sentences(self.data.splits[split], self.processor, self.max_length)
        self.notes += [f"{split}: {n}" for n in made.notes]
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        labels = torch.tensor([r["labels"] for r in rows])
        padded = self.processor.pad([{k: v for k, v in r.items() if k != "labels"} for r in rows],
                                    return_tensors="pt")
        return dict(padded) | {"labels": labels}


class LanguageModelling(_Words):
    """``input_ids``, ``labels`` (B, T): documents end to end, cut into rows of max_length."""

    auto = AUTO["language-modelling"]
    usual_length = 512

    def make(self, split: str) -> Rows:
        return Documents(self.data.splits[split], self.processor, self.max_length or 512)

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return pad_tokens(rows, self.processor.pad_token_id)

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        logits = logits_of(outputs)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(),
                                           label_smoothing=smoothing)

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        guess = logits_of(logits).argmax(-1)
        # position t answers for token t + 1: aligned here, so that measure compares as they stand
        return torch.cat([torch.full_like(guess[:, :1], -100), guess[:, :-1]], 1)

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits, labels = logits_of(logits)[:, :-1], labels[:, 1:]
        rows = []
        for row, wanted in zip(logits, labels, strict=True):  # fp32 for one row's words at a time
            rows.append(torch.stack([nn.functional.cross_entropy(
                row.float(), wanted, reduction="sum"), (wanted != -100).sum().float()]))
        return torch.stack(rows)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        answers, labels = torch.as_tensor(answers), torch.as_tensor(labels)
        asked = (labels != -100) & (answers != -100)
        return {"token_accuracy": (answers == labels)[asked].double().mean().item()}

    def figures(self, answers: Any, losses: Any, labels: Any) -> dict[str, float]:
        """As for every task, with ``perplexity``, e to the loss per token."""
        found = super().figures(answers, losses, labels)
        return {**found, "perplexity": math.exp(min(found["loss"], 700.0))}


class InstructionTuning(LanguageModelling):
    """As language modelling, row by row, with ``labels`` -100 wherever nothing is learnt."""

    usual_length = None

    def make(self, split: str) -> Rows:
        turns = Turns(self.data.splits[split], self.processor, self.max_length,
                      self.data.where.get(split))
        self.notes += [f"{split}: {n}" for n in turns.notes]
        return turns

    def stops(self) -> list[int]:
        from .chat import stop_ids

        return stop_ids(self.processor)

    def preview(self, n: int = 3) -> list[str]:
        """As the model sees them, with what is learnt between guillemets."""
        from .chat import show

        tokens = self.rows("train").tokens  # type: ignore[attr-defined]
        return [show(self.processor, t) for t in tokens[:n]]


TASKS: dict[str, type[Task]] = {
    "image-classification": ImageClassification,
    "text-classification": TextClassification,
    "language-modelling": LanguageModelling,
    "instruction-tuning": InstructionTuning,
}


def task_for(data: Data, model: str | nn.Module, *, processor: Any = None,
             max_length: int | None = None, trust_remote_code: bool = False) -> Task:
    """The task of `data`, with the tokenizer or image processor that belongs to `model`."""
    kind = TASKS[data.task]
    if isinstance(processor, str | Path):
        check_there(str(processor))
        processor = processor_for(data.task, str(processor), trust_remote_code)
    if processor is None:
        if isinstance(model, str):
            check_local(model)
        processor = processor_for(data.task, model, trust_remote_code)
    if kind is not ImageClassification:
        from .chat import prepare_tokenizer

        if data.task in ("language-modelling", "instruction-tuning"):
            processor = prepare_tokenizer(processor)
        elif processor.pad_token is None:
            processor.pad_token = processor.eos_token
            if processor.pad_token is None:
                raise ConfigError("the tokenizer has neither a padding nor an end-of-text token, "
                                  "so rows cannot be put together; set tokenizer.pad_token")
    return kind(data, processor, max_length)


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits among a model's outputs: named so, or the first."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if hasattr(outputs, "logits"):
        return outputs.logits
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: str, batch_size: int = 64) -> dict[str, float]:
    """The task's figures of a transformers model on one split, in row order, without a trainer."""
    rows, was = task.rows(split), model.training
    model.eval()
    answers: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    for start in range(0, len(rows), batch_size):
        stop = min(start + batch_size, len(rows))
        batch = task.collate([rows[i] for i in range(start, stop)])
        logits = logits_of(model(**{k: v for k, v in batch.items() if k != "labels"}))
        answers += task.reduce(logits, batch["labels"])
        losses += task.losses(logits, batch["labels"])
        labels += batch["labels"]
    model.train(was)
    return task.figures(_together(answers), torch.stack(losses), _together(labels))


def _together(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of unlike length side by side; what is filled in was never asked."""
    if not rows[0].dim():
        return torch.stack(rows)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def pad_tokens(rows: Sequence[dict[str, Any]], pad: int) -> Batch:
    """Right-padded to the longest row: ids with `pad`, labels with -100, mask with 0."""
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.as_tensor(r["input_ids"]) for r in rows]
    labels = [torch.as_tensor(r["labels"]) for r in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def classification(answers: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur: 2 TP / (2 TP + FP + FN)."""
    if answers.shape != labels.shape:
        raise DataError(f"{tuple(answers.shape)} answers for {tuple(labels.shape)} labels")
    table = torch.bincount(labels * classes + answers, minlength=classes**2)
    table = table.view(classes, classes).double()
    hit, said, true = table.diagonal(), table.sum(0), table.sum(1)
    present = true > 0
    f1 = (2 * hit / (said + true).clamp(min=1))[present].mean().item()
    return {"accuracy": (hit.sum() / true.sum().clamp(min=1)).item(), "f1": f1}
