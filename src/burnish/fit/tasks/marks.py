"""Answers that are marked good or bad, each by itself: KTO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError, DataError
from .. import chat, tools
from ..rows import Choices, Rows
from .base import Batch
from .language import InstructionTuning
from .preferences import PreferenceTuning


def kto(apart: Tensor, kl: Tensor, good: Tensor, beta: float, gain: float = 1.0, loss: float = 1.0
        ) -> Tensor:
    """(B,) losses of answers whose log p / p_base is `apart` (B,), marked `good` (B,) or not:

        good  gain (1 - s(beta (apart - kl)))
        bad   loss (1 - s(beta (kl - apart)))         (KTO: Ethayarajh et al., 2024)

    kl: how far the model has gone from the base; no gradient passes through it.
    """
    away = beta * (apart - kl)
    return torch.where(good, gain * torch.sigmoid(-away), loss * torch.sigmoid(away))


def distance(strange: Tensor) -> Tensor:
    """The divergence from the base, from log p / p_base (B,) of answers to other prompts: their
    mean, and no less than 0."""
    return strange.detach().mean().clamp(min=0)


class Marks(Choices):
    """Answers to prompts, each beside the next row's answer to its prompt.

    reference: (rows, 2), as :class:`Choices` has it.  good: (rows,)
    """

    def __init__(self, rows: Any, tokenizer: Any, max_length: int | None,
                 where: Callable[[int], str] | None):
        plain = "prompt" in rows.column_names
        self.notes: list[str] = []
        self.tokens: list[tuple[chat.Tokens, chat.Tokens]] = []
        self.sources: list[int] = []
        self.reference: Tensor | None = None
        given = list(rows)
        for i, row in enumerate(given):
            at, other, pair = where(i) if where else f"row {i}", given[(i + 1) % len(given)], []
            for answer in (row, other):
                if plain:
                    marked = chat.mark_completion(tokenizer, row["prompt"], answer["completion"])
                else:
                    said = [*row["messages"][:-1], answer["messages"][-1]]
                    marked = chat.last(chat.mark(tokenizer, said, at, tools.of(row)))
                pair.append(chat.tokenize(tokenizer, marked, max_length, special=plain))
            if any(all(y == -100 for y in t.labels[1:]) for t in pair):
                continue
            self.tokens.append((pair[0], pair[1]))
            self.sources.append(i)
        if lost := len(given) - len(self.sources):
            self.notes.append(f"{lost} of {len(given)} rows are longer than max_length={max_length}"
                              " before the answer starts, and are left out")
        if not self.tokens:
            raise DataError(f"no row has an answer within max_length={max_length} tokens; raise it")
        self.good = [bool(given[i]["good"]) for i in self.sources]

    def row(self, i: int) -> dict[str, Any]:
        return super().row(i) | {"good": self.good[i]}


class UnpairedPreferenceTuning(PreferenceTuning):
    """``input_ids`` (B, 2, T): an answer behind its prompt, and the next row's answer behind it,
    ``labels`` (B, 2 T), ``reference`` (B, 2), ``good`` (B,).

    The second is of nobody's opinion: it tells how far the model has gone from the base, over the
    batch in a step and over the split in an evaluation (:func:`distance`). The base is asked once,
    as for pairs.
    """

    metric = "accuracy"
    greater_is_better = True
    truth = ("labels", "reference", "good")
    settings = ("loss_type", "beta", "desirable_weight", "undesirable_weight", "reference_from",
                "reference_is")

    def prepare(self) -> None:
        InstructionTuning.prepare(self)
        if self.kind != "kto":
            raise ConfigError(f"loss_type={self.kind!r} compares two answers to a prompt, and "
                              "these rows have one, marked good or bad; kto is for them")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            value = self.how.get(name, 1.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name}={value!r}: expected a number above 0")
        if "train" in self.data.splits:
            marks = set(self.data.train["good"][:])
            if len(marks) < 2:
                raise DataError(f"{self.data.source}: every answer is marked "
                                f"{'good' if True in marks else 'bad'}; nothing is told apart")

    @property
    def kind(self) -> str:
        return self.how.get("loss_type", "kto")

    @property
    def beta(self) -> float:
        return float(self.how.get("beta", 0.1))

    def make(self, split: str) -> Rows:
        made = Marks(self.data.splits[split], self.processor, self.max_length,
                     self.data.where.get(split))
        self.tell(split, made.notes)
        return made

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return super().together(rows) | {"good": torch.tensor([r["good"] for r in rows])}

    def right(self, truth: Any) -> Tensor:
        return torch.as_tensor(truth["good"] if isinstance(truth, Mapping) else truth[2])

    # -- loss and figures ----------------------------------------------------------------------
    def apart(self, logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        """log p / p_base of the row's answer, and of the other row's: (B, 2)."""
        return self.spoken(logits, labels)[0] - reference

    def told_apart(self, apart: Tensor, good: Tensor) -> Tensor:
        weights = (float(self.how.get(f"{k}desirable_weight", 1.0)) for k in ("", "un"))
        return kto(apart[:, 0], distance(apart[:, 1]), good, self.beta, *weights)

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        tokens, reference, good = labels
        return self.told_apart(self.apart(self.logits(outputs), tokens, reference), good).mean()

    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        """What figures are of; a row's loss is not its own, so none is kept."""
        tokens, reference, _ = (truth[k] for k in self.truth) if isinstance(truth, Mapping) \
            else truth
        apart = self.apart(self.logits(outputs), tokens, reference)
        return apart, torch.zeros(len(apart), 2, device=apart.device)

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """``kl`` of the split; answers whose reward, ``beta`` times how much likelier than the base
        they are, less that, has the sign of their mark; and how much higher the rewards of good
        ones are, where there are both."""
        apart, good = torch.as_tensor(answers).double(), torch.as_tensor(labels).bool()
        kl, reward = distance(apart[:, 1]), self.beta * apart[:, 0]
        found = {"loss": float(self.told_apart(apart, good).mean()),
                 "accuracy": float(((apart[:, 0] > kl) == good).double().mean()), "kl": float(kl)}
        if good.any() and not good.all():
            found["margin"] = float(reward[good].mean() - reward[~good].mean())
        return found

    def preview(self, n: int = 3) -> list[str]:
        rows = self.rows("train")
        assert isinstance(rows, Marks)
        return [f"{'+' if good else '-'} {chat.show(self.processor, own)}"
                for (own, _), good in zip(rows.tokens[:n], rows.good, strict=False)]
