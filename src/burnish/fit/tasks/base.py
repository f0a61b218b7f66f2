"""What a task is: how a model is loaded for it, a row becomes tensors, rows a batch, and what is
measured. The tasks differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.errors import ConfigError
from ...formats.model_files import check_weights, loading, named, unfound
from ...formats.opened import opened_as, opens
from ..autos import auto_of
from ..data import Data
from ..places import check_local, check_served
from ..rows import Rows

Batch = dict[str, torch.Tensor]


@dataclass
class Task:
    """One way from rows to a loss. `processor` is the tokenizer or image processor."""

    data: Data
    processor: Any = None
    max_length: int | None = None
    seed: int = 0
    #: what was said of :attr:`settings`
    how: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: tensors of the loaded model that its files lack, or have in another size: drawn anew
    fresh: list[str] = field(default_factory=list)
    #: what numbers the model is of, once it is settled
    reads: torch.dtype | None = field(default=None, repr=False)
    #: the part of the recipe that makes the loss, where it is not the task's
    loss_part: str = field(default="", repr=False)
    #: where a task that makes files puts them
    folder: Path | None = field(default=None, repr=False)
    _made: dict[str, tuple[Any, Rows]] = field(default_factory=dict, repr=False)

    #: columns of a row that is asked about, the last ones where they are there
    takes: ClassVar[tuple[str, ...]] = ("text",)
    #: whether two pictures are asked about as one question
    paired: ClassVar[bool] = False
    #: what is asked about, where a row is no text
    word: ClassVar[str] = ""
    #: entries of a batch that say what is right
    truth: ClassVar[tuple[str, ...]] = ("labels",)
    #: whether the loss is this task's and not the model's
    own_loss: ClassVar[bool] = False
    #: whether models of this task divide their loss by the items of an update where they are told
    counts_items: ClassVar[bool] = False
    #: whether a sample has a loss by itself, whatever stands beside it
    alone: ClassVar[bool] = True
    #: what it reads in the head's outputs, where they are not what the model was made to say
    #: (:attr:`burnish.core.method.Method.head_outputs`)
    head_outputs: ClassVar[str] = ""
    #: keys of context (core/keys.py) that it gives of its own rows, and no column of the data
    gives: ClassVar[tuple[str, ...]] = ()
    #: whether batches hold several rows of a class (:class:`burnish.fit.order.Classed`)
    by_class: ClassVar[bool] = False
    #: whether rows are of unlike length, and a batch is filled up to its longest
    unlike: ClassVar[bool] = False
    #: whether what is right takes so much room that only :meth:`told` of it is kept
    heavy: ClassVar[bool] = False
    #: whether evaluation lets the model write its answers, in :meth:`looked`
    writes: ClassVar[bool] = False
    #: settings of a question: how an answer is drawn
    drawing: ClassVar[tuple[str, ...]] = ()
    #: settings of the run that the task itself reads
    settings: ClassVar[tuple[str, ...]] = ()
    #: whether what is right is one of several classes, which may be smoothed
    smooths: ClassVar[bool] = True
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
        auto = auto_of(self.data.task)
        with loading(name, f"the model for {self.data.task},", True, trust_remote_code) as where:
            if not trust_remote_code:
                check_weights(where, lambda: auto.from_config(
                    transformers.AutoConfig.from_pretrained(where)))
            try:
                if unread and not trust_remote_code and opens(where):
                    model, found = opened_as(auto, where, **self.head(), **kw)
                else:
                    model, found = auto.from_pretrained(
                        where, trust_remote_code=trust_remote_code, use_safetensors=True,
                        output_loading_info=True, **self.head(), **kw)
            except (OSError, ValueError) as e:
                raise ConfigError(f"{name} cannot be loaded for {self.data.task}: "
                                  f"{unfound(name, e)}") from None
        if where != name:
            named(model, name)
        changed = (k[0] if isinstance(k, tuple) else k for k in found["mismatched_keys"])
        self.fresh = sorted({*found["missing_keys"], *changed})
        self.settle(model)
        return model

    def files(self, name: str) -> str:
        """Where the weights of the model at `name` lie."""
        return name

    def blank(self, name: str) -> nn.Module:
        """The model at `name` on the meta device, of tasks whose models are not transformers'."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Readies what reads the rows. Raises ConfigError where it cannot read them."""

    def on(self, data: Data, model: nn.Module) -> Task:
        """The same task of other data, for a model that is there."""
        made = replace(self, data=data, notes=[], fresh=[], _made={})
        made.prepare()
        made.settle(model)
        return made

    def head(self) -> dict[str, Any]:
        return {}

    def fit_head(self, model: nn.Module) -> nn.Module:
        """Gives a model that is already here the right number of classes."""
        return model

    def settle(self, model: nn.Module) -> None:
        """Makes the model and what reads its data agree, before any row is read.

        Raises ConfigError where they cannot.
        """
        self.reads = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

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

    def singly(self, split: str) -> Rows:
        """The split as tensors of which each is made of one row of the data."""
        return self.rows(split)

    def preview(self, n: int = 3) -> list[str]:
        """A few rows as people read them."""
        return self.data.samples(n)

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Rows as one batch, with the keys of context that they have."""
        keys = [k for k in self.data.keys if k in rows[0]]
        bare = [{k: v for k, v in r.items() if k not in keys} for r in rows] if keys else rows
        return self.agreed(self.together(bare)) | {k: torch.tensor([r[k] for r in rows])
                                                   for k in keys}

    def agreed(self, batch: Batch) -> Batch:
        """Pictures and sounds as the numbers that the model is of; what is right stays."""
        if self.reads is None:                           # no model is settled, or it has no such
            return batch
        return {k: v.to(self.reads) if k not in self.truth and isinstance(v, torch.Tensor)
                and v.is_floating_point() else v for k, v in batch.items()}

    def together(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

    def example(self, batch_size: int, split: str = "train") -> Batch:
        """The costliest batch of a split's rows: what the memory must be planned for."""
        return self.collate(self.rows(split).longest(batch_size))

    # -- models that are no transformers models --------------------------------------------
    def input(self, batch: Batch) -> torch.Tensor:
        """What a plain module is called with."""
        return batch["input_ids"]

    def loss(self, outputs: Any, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """The task's loss of a module's outputs."""
        return nn.functional.cross_entropy(self.logits(outputs), labels, label_smoothing=smoothing)

    def feed(self, batch: Batch) -> Batch:
        """What a model is given to answer, without what is right."""
        return {k: v for k, v in batch.items() if k not in self.truth}

    def logits(self, outputs: Any) -> torch.Tensor:
        """The logits among a model's outputs: named so, or the first."""
        if isinstance(outputs, torch.Tensor):
            return outputs
        if hasattr(outputs, "logits"):
            return outputs.logits
        return outputs["logits"] if isinstance(outputs, dict) else outputs[0]

    def right(self, truth: Any) -> torch.Tensor:
        """What is right, of a batch, or of its entries named in `truth` as a trainer hands them."""
        if isinstance(truth, Mapping):
            truth = tuple(truth[k] for k in self.truth)
        elif not isinstance(truth, tuple | list):
            return torch.as_tensor(truth)
        return truth[0] if len(truth) == 1 else torch.stack([torch.as_tensor(t) for t in truth], -1)

    def call(self, batch: Batch, plain: bool, smoothing: float = 0.0
             ) -> tuple[Any, Callable[[Any, Any], Any] | None]:
        """(batch, loss) as :meth:`burnish.Tuned.step`, simulate and measure take them."""
        if self.own_loss:
            return (self.feed(batch), tuple(batch[k] for k in self.truth)), \
                lambda out, b: self.loss(out, b[1], smoothing)
        if plain:
            return (self.input(batch), self.right(batch)), \
                lambda out, b: self.loss(out, b[1], smoothing)
        if smoothing:
            return batch, lambda out, b: self.loss(out, self.right(b), smoothing)
        return batch, None

    # -- the figures -----------------------------------------------------------------------
    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """What of the model's answer is kept for the figures (evaluation holds all of it)."""
        return logits.argmax(-1)

    def kept(self, outputs: Any, truth: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What evaluation keeps of a batch: its answers, and the loss of each row."""
        logits, right = self.logits(outputs), self.right(truth)
        return self.reduce(logits, right), self.losses(logits, right)

    def looked(self, model: Any, batch: Any, outputs: Any, longest: bool = False
               ) -> tuple[Any, torch.Tensor]:
        """What evaluation keeps of a batch (or of what is right, where nothing is written).
        longest: for memory: what is written is as long as it may be."""
        return self.kept(outputs, batch)

    def told(self, labels: torch.Tensor) -> torch.Tensor:
        """What of the labels is kept until figures are made of all rows."""
        return labels

    def losses(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """(rows, 2): per row the sum of -log p over what was asked, and how much was asked.

        Kept apart, so that the mean weighs every answer alike, however rows are batched.
        """
        sums = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        return torch.stack([sums, torch.ones_like(sums)], -1)

    def measure(self, answers: Any, labels: Any) -> dict[str, float]:
        raise NotImplementedError

    def figures(self, answers: Any, losses: Any, labels: Any, rows: Rows | None = None
                ) -> dict[str, float]:
        """``loss``, the plain task loss per answer, and what :meth:`measure` finds beside it.

        rows: that were answered, in their order, for figures that need more than labels.
        """
        total, count = torch.as_tensor(losses).double().sum(0).tolist()
        return {"loss": total / max(count, 1.0), **self.measure(answers, labels)}

    def mistakes(self, answers: Any, losses: Any, labels: Any) -> dict[str, Any]:
        """What was taken for what, of tasks that tell classes, as plain values."""
        return {}

    def taught_by(self, part: str, read: Any) -> None:
        """A part of the recipe makes the loss, of the key that it reads as `read` says
        (core/keys.py). Raises ConfigError for what then does nothing."""

    def classes(self, rows: Rows) -> Sequence[int]:
        """The class of each of the rows, of tasks whose batches go by it."""
        raise NotImplementedError

    def begun(self, path: str | Path | None) -> None:
        """The run goes on from what the one in this folder has learnt."""

    def ready(self, tuned: Any, device: Any, batch_size: int) -> None:
        """What the rows still lack once the recipe has joined the model and before it trains."""

    def shown(self, tuned: Any, device: Any) -> dict[str, Any]:
        """What the report shows of a finished run beside its figures, as plain values by name."""
        return {}

    # -- answers to people -------------------------------------------------------------------
    def parted(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], str, str] | None:
        """A row of the data as (what is asked, that in words, what is right in words), where the
        columns of `takes` do not say it."""
        return None

    def encode(self, row: Mapping[str, Any]) -> Batch:
        """A batch of one row, without what is right. `row` has the columns of `takes`."""
        raise NotImplementedError

    def posed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the data as :meth:`answer` is asked."""
        return {k: row[k] for k in self.takes if row.get(k) is not None}

    def draws(self, **how: Any) -> None:
        """How the next answers are drawn, by :attr:`drawing`. Raises ConfigError for a setting that
        is not this task's."""
        for name, value in how.items():
            if name not in self.drawing:
                raise ConfigError(f"{name}={value!r} says how a picture is drawn, and "
                                  f"{self.data.task} is not asked with it; leave it out")

    def answer(self, model: nn.Module, row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """What the model says of a row, as plain values. tokens: the longest text that it writes.
        """
        raise NotImplementedError

    def said(self, answer: Mapping[str, Any]) -> str:
        """An answer in a line."""
        return str(answer["text"])


def flat(batch: Batch, each: int, truth: Sequence[str]) -> Batch:
    """Samples of several texts (B, K, T) as a model takes them, (B K, T), without what is right;
    a key of a sample is that of each of its texts."""
    return {k: v.flatten(0, 1) if v.dim() > 2 else v.repeat_interleave(each, 0)
            for k, v in batch.items() if k not in truth}


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
        said, lost = task.looked(model, batch, model(**task.feed(batch)))
        answers += said
        losses += lost
        labels += task.told(task.right(batch))
    model.train(was)
    return task.figures(together(answers), torch.stack(losses), together(labels), rows)


def together(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of unlike length side by side; what is filled in was never asked."""
    if not rows[0].dim():
        return torch.stack(rows)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
