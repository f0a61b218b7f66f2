"""Pictures and texts with a label: a class, several classes, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core.errors import ConfigError, DataError
from ..from_files import Pictures
from ..heads import resize_head
from ..mistakes import mistaken
from ..rows import Rows, Sentences
from .base import Batch, Task
from .named import Named
from .textual import Textual


class _Picture(Task):
    """``pixel_values`` (B, C, H, W) and ``labels``."""

    takes = ("image",)

    def input(self, batch: Batch) -> torch.Tensor:
        return batch["pixel_values"]

    def make(self, split: str) -> Rows:
        return Pictures(self.data.splits[split], self.processor, self.data.where.get(split))

    def encode(self, row: Mapping[str, Any]) -> Batch:
        return self.agreed({"pixel_values": self.processor(row["image"])[None]})

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]),
                "labels": self.labels([r["labels"] for r in rows])}

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        raise NotImplementedError


class _Sentence(Textual):
    """``input_ids``, ``attention_mask`` (B, T) padded to the longest row, and ``labels``."""

    takes = ("text", "pair")

    def make(self, split: str) -> Rows:
        made = Sentences(self.data.splits[split], self.processor, self.max_length)
        self.tell(split, made.notes)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return self.padded(rows) | {"labels": self.labels([r["labels"] for r in rows])}

    def check(self, model: nn.Module) -> None:
        """Heads of encoder-decoders read the state at the last end of text: every row needs one,
        and as many as the others."""
        super().check(model)
        config = getattr(model, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            return
        end, first = config.eos_token_id, None              # type: ignore[union-attr]
        name = f"{type(model).__name__} reads a class at the end of a text"
        for split in self.data.splits:
            rows = self.rows(split)
            for i in range(len(rows)):
                ends = list(rows[i]["input_ids"]).count(end)
                if not ends:
                    raise ConfigError(f"{name}, and its tokenizer ends none: {split}, row {i} has "
                                      f"no token {end} (eos_token_id); let the tokenizer add it")
                first = first or ends
                if ends != first:
                    raise DataError(f"{name}: {split}, row {i} has {ends} of them and the first "
                                    f"{first}; leave {self.processor.eos_token!r} out of the texts")

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        raise NotImplementedError


class _Labelled(Named):
    """What a head over a whole row has in common; `problem` is transformers' name of its loss."""

    problem = ""

    def head(self) -> dict[str, Any]:
        return {**super().head(), "problem_type": self.problem}

    def fit_head(self, model: nn.Module) -> nn.Module:
        return resize_head(model, self.names, self.problem)

    def asked(self, model: nn.Module, row: Mapping[str, Any]) -> torch.Tensor:
        return self.logits(model(**self.encode(row)))[0].float()


class _Single(_Labelled):
    """``labels`` (B,): the number of a class."""

    metric = "accuracy"
    greater_is_better = True
    problem = "single_label_classification"

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        return torch.as_tensor(given)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        return classification(torch.as_tensor(answers), torch.as_tensor(labels), len(self.names))

    def mistakes(self, answers: Any, losses: Any, labels: Any) -> dict[str, Any]:
        return mistaken(torch.as_tensor(answers), torch.as_tensor(labels),
                        torch.as_tensor(losses)[:, 0], self.names)

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        share = self.asked(model, row).softmax(-1)
        best = int(share.argmax())
        return {"label": self.names[best], "probability": float(share[best])}

    def said(self, answer: Mapping[str, Any]) -> str:
        return f"{answer['label']} ({answer['probability']:.3f})"


class _Several(_Labelled):
    """``labels`` (B, C): one where a row is of a class, else nought. Each class has a loss of its
    own, the binary cross-entropy; a class is answered where its probability is above a half."""

    metric = "f1"
    greater_is_better = True
    smooths = False
    problem = "multi_label_classification"

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        out = torch.zeros(len(given), len(self.names))
        for row, classes in zip(out, given, strict=True):
            row[torch.as_tensor(classes, dtype=torch.long)] = 1.0
        return out

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self.logits(outputs), labels)

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return logits > 0

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        sums = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(),
                                                              reduction="none").sum(-1)
        return torch.stack([sums, torch.full_like(sums, float(len(self.names)))], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        """F1 over all marks, its mean over classes that occur, and rows with no mark wrong."""
        said, true = torch.as_tensor(answers).bool(), torch.as_tensor(labels).bool()
        hit, wrong = (said & true).double(), (said ^ true).double()
        each = 2 * hit.sum(0) / (2 * hit.sum(0) + wrong.sum(0)).clamp(min=1)
        there = true.any(0)
        return {"f1": float(2 * hit.sum() / (2 * hit.sum() + wrong.sum()).clamp(min=1)),
                "f1_macro": float(each[there].mean()) if there.any() else 0.0,
                "accuracy": float((said == true).all(-1).double().mean())}

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        share = self.asked(model, row).sigmoid().tolist()
        return {"labels": [n for n, p in zip(self.names, share, strict=True) if p > 0.5],
                "probabilities": dict(zip(self.names, share, strict=True))}

    def said(self, answer: Mapping[str, Any]) -> str:
        return ", ".join(f"{n} ({answer['probabilities'][n]:.3f})"
                         for n in answer["labels"]) or "none"


class _Number(_Labelled):
    """``labels`` (B,): a number, as it stands in the data; the loss is the mean square."""

    smooths = False
    problem = "regression"

    @property
    def names(self) -> Sequence[str]:
        return ("value",)

    def labels(self, given: Sequence[Any]) -> torch.Tensor:
        return torch.as_tensor(given, dtype=torch.float32)

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        return nn.functional.mse_loss(self.logits(outputs).squeeze(-1), labels)

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        return logits.squeeze(-1).float()

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        square = (logits.squeeze(-1).float() - labels).square()
        return torch.stack([square, torch.ones_like(square)], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        return regression(torch.as_tensor(answers), torch.as_tensor(labels))

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        return {"value": float(self.asked(model, row).squeeze(-1))}

    def said(self, answer: Mapping[str, Any]) -> str:
        return f"{answer['value']:.4g}"


class ImageClassification(_Single, _Picture):
    """Pictures, each of one class."""


class ImageMultiLabel(_Several, _Picture):
    """Pictures, each of any number of classes."""


class ImageRegression(_Number, _Picture):
    """Pictures with a number each."""


class TextClassification(_Single, _Sentence):
    """Texts, or pairs of them, each of one class."""


class TextMultiLabel(_Several, _Sentence):
    """Texts, or pairs of them, each of any number of classes."""


class TextRegression(_Number, _Sentence):
    """Texts, or pairs of them, with a number each."""


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


def regression(answers: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean absolute error, the share of the variance that is explained (R squared), and the rank
    correlation (Spearman's, ties at their mean rank)."""
    from scipy.stats import spearmanr

    said, true = answers.double(), labels.double()
    spread = (true - true.mean()).square().sum()
    left = (said - true).square().sum()
    found = {"mae": float((said - true).abs().mean()),
             "r2": float(1 - left / spread) if spread > 0 else 0.0}
    if len(true) > 1 and spread > 0 and said.unique().numel() > 1:
        found["spearman"] = float(spearmanr(said.numpy(), true.numpy()).statistic)
    return found
