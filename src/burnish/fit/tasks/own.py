"""Models of somebody's own code, where transformers has none: how they are called, once tried."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...core.batches import moved
from ...core.errors import ConfigError
from ...core.reading import plain
from .base import Batch, Task


class Own(Task):
    """The model is called by the names of its own arguments and answers with logits (B, C), bare or
    as ``.logits``; the loss is the task's."""

    own_loss = True
    #: what of a row the model reads, in words
    reads_what = ""

    def prepare(self) -> None:
        if self.processor is not None:
            raise ConfigError(f"{self.reads_what} need no processor; leave processor= out")
        if self.max_length is not None:
            raise ConfigError(f"max_length={self.max_length} counts tokens, and {self.reads_what} "
                              "have none")

    def settle(self, model: nn.Module) -> None:
        super().settle(model)
        self.called_with(type(model).__name__, arguments(model))

    def called_with(self, name: str, names: list[str]) -> None:
        """Notes what the batch is called by. Raises ConfigError where the model takes other things.
        """
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Asks for the first two rows what the model is asked later on."""
        rows = self.rows("train")
        batch = self.collate([rows[i] for i in range(min(2, len(rows)))])
        where = next((p.device for p in model.parameters()), torch.device("cpu"))
        name = type(model).__name__
        try:
            with answering(model):
                said = self.logits(model(**moved(self.feed(batch), where)))
        except Exception as e:
            raise ConfigError(f"{name} does not take {self.shapes(batch)}: {plain(e, 200)} "
                              f"({type(e).__name__})") from None
        wanted = (len(batch["labels"]), len(self.names))
        if not isinstance(said, torch.Tensor) or tuple(said.shape) != wanted:
            has = tuple(said.shape) if isinstance(said, torch.Tensor) else type(said).__name__
            raise ConfigError(f"{name} answers {wanted[0]} rows with {has}; expected logits "
                              f"{wanted}, one for each class (config.num_labels)")

    def call(self, batch: Batch, plain: bool, smoothing: float = 0.0
             ) -> tuple[Any, Callable[[Any, Any], Any] | None]:
        return (self.feed(batch), self.right(batch)), \
            lambda out, b: self.loss(out, b[1], smoothing)

    @property
    def names(self) -> Any:
        raise NotImplementedError

    def shapes(self, batch: Batch) -> str:
        return ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.feed(batch).items())


@contextlib.contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """As it answers: nothing is drawn, kept or counted."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def arguments(model: nn.Module) -> list[str]:
    """The names that the model's own forward takes, whatever class stands before it."""
    for kind in type(model).__mro__:
        if (forward := vars(kind).get("forward")) is None:
            continue
        own = list(inspect.signature(forward).parameters.values())[1:]
        named = [p.name for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if named:
            return named
    return []
