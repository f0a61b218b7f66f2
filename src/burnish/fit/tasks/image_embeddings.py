"""Pictures as directions: those of one class close to each other, others apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...blocks.state.supervised import hardest, per_anchor
from ...core.errors import ConfigError, DataError
from ...core.keys import Read
from ..heads import resize_head
from ..rows import Rows
from .base import Batch
from .classes import _Picture
from .directions import Directions, pieces, retrieval

#: numbers of an embedding where nobody says
DIMENSION = 128


class ImageEmbedding(Directions, _Picture):
    """``pixel_values`` (B, C, H, W) and ``labels`` (B,), the class of each.

    An embedding is what a fresh head of `dimension` outputs says, of length one. `loss_type`
    "supcon", every two pictures of a batch compared
    (:func:`burnish.blocks.state.supervised.per_anchor`), or "triplet", the hardest of a batch
    (:func:`burnish.blocks.state.supervised.hardest`); the mean over the pictures that have others
    to be compared with. Batches hold `per_class` of a class (:class:`burnish.fit.order.Classed`).
    A recipe that makes the head's outputs an embedding has a loss of its own, which alone is
    minimised: it is given ``class``. What is told is the task's.
    """

    losses_known = ("supcon", "triplet")
    paired = True
    settings = ("dimension", "per_class", "loss_type", "scale", "gamma")
    metric = "recall_at_1"
    greater_is_better = True
    head_outputs = "embedding"
    gives = ("class",)
    by_class = True

    # -- the model -----------------------------------------------------------------------
    @property
    def dimension(self) -> int:
        return int(self.how.get("dimension", DIMENSION))

    def head(self) -> dict[str, Any]:
        return {"num_labels": self.dimension, "ignore_mismatched_sizes": True}

    def fit_head(self, model: nn.Module) -> nn.Module:
        return resize_head(model, [f"LABEL_{i}" for i in range(self.dimension)], None)

    def taught_by(self, part: str, read: Read | None) -> None:
        """A part of the recipe makes the loss, of the classes that it reads as `read` says."""
        for name in ("loss_type", "scale", "gamma"):
            if name in self.how:
                raise ConfigError(f"{name}={self.how[name]!r} does nothing: {part} minimises a "
                                  "loss of its own, and that alone; leave it out")
        many = len(self.data.labels or ())
        if read is not None and read.below < many:
            raise ConfigError(f"{part} tells {read.below} classes apart and the data have {many}: "
                              f"give {part}({read.key.below}={many})")
        self.loss_part = part

    # -- the rows ------------------------------------------------------------------------
    def make(self, split: str) -> Rows:
        rows = self.data.splits[split]
        if split == "train":
            self.data.several("label", split)
        if len(set(rows["label"][:])) == len(rows):
            share = ", or another share with validation=" if split == "validation" else ""
            raise DataError(f"{self.data.source}, {split}: no two of {len(rows)} rows are of one "
                            f"class, and nothing is near another; give several of a class{share}")
        return super().make(split)

    def labels(self, given: Sequence[Any]) -> Tensor:
        return torch.as_tensor(given)

    def classes(self, rows: Rows) -> list[int]:
        """The class of each of the rows."""
        return [int(c) for c in rows.labels]                       # type: ignore[attr-defined]

    # -- the loss ------------------------------------------------------------------------
    def call(self, batch: Batch, plain: bool, smoothing: float = 0.0) -> Any:
        if plain:
            return (self.input(batch), (batch["labels"],)), lambda out, b: self.loss(out, b[1])
        (fed, truth), loss = super().call(batch, plain, smoothing)
        if self.loss_part:
            fed = fed | {"class": batch["labels"].clone()}      # counted by itself
        return (fed, truth), loss

    def directions(self, outputs: Any) -> Tensor:
        return F.normalize(self.logits(outputs).float(), dim=-1)

    def compared(self, e: Tensor, labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """(losses of these rows among all, whether each has others to be compared with)."""
        if self.kind == "triplet":
            return hardest(e, labels, self.margin, rows)
        return per_anchor(e, labels, 1 / self.scale, rows=rows)

    def loss(self, outputs: Any, labels: Any, smoothing: float = 0.0) -> Tensor:
        """Beside a recipe that makes the loss it is told as in an evaluation, and pulls nothing."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.loss_part):
            losses, has = self.compared(self.directions(outputs), self.right(labels), slice(None))
            mean = losses.sum() / has.sum().clamp_min(1)
        return mean + 0.0 * self.logits(outputs).sum() if self.loss_part else mean

    # -- the figures ---------------------------------------------------------------------
    def kept(self, outputs: Any, truth: Any) -> tuple[Tensor, Tensor]:
        """The directions; a row by itself has no loss, so that none is kept of it."""
        e = self.directions(outputs)
        return e, e.new_zeros(len(e), 2)

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Any = None) -> dict[str, float]:
        """``loss`` of all rows of a split compared with each other, so that it does not go by how
        they are batched (and is larger than a batch's, where fewer are compared)."""
        e, y = torch.as_tensor(answers), torch.as_tensor(labels)
        found = [self.compared(e, y, some) for some in pieces(len(e))]
        total = sum(float(loss.double().sum()) for loss, _ in found)
        count = sum(int(has.sum()) for _, has in found)
        return {"loss": total / max(count, 1), **self.measure(e, y)}

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        return retrieval(torch.as_tensor(answers), torch.as_tensor(labels))

    # -- answers to people ---------------------------------------------------------------
    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """A picture's direction, or how near two pictures are."""
        seen = torch.stack([self.processor(row[k]) for k in ("image", "pair") if k in row])
        return self.told_of(self.directions(model(**self.agreed({"pixel_values": seen}))))
