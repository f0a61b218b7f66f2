"""What a batch is: a mapping of tensors, which a model takes as keywords; a tensor; or a tuple of
what the model takes (either of these) and what is right, which a loss reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError


def call(model: nn.Module, batch: Any) -> Any:
    """The model's answer to a batch."""
    given = inputs(batch)
    return model(**given) if isinstance(given, Mapping) else model(given)


def inputs(batch: Any) -> Any:
    """What of a batch the model is called with."""
    return batch[0] if isinstance(batch, list | tuple) else batch


def tensors(batch: Any) -> Iterator[Tensor]:
    """All that have a first axis, in order."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield batch
        return
    for part in batch.values() if isinstance(batch, Mapping) else \
            batch if isinstance(batch, list | tuple) else ():
        yield from tensors(part)


def size(batch: Any) -> int:
    """Samples in a batch."""
    first = next(tensors(batch), None)
    if first is None:
        raise DataError(f"a batch is a mapping, a tuple or a tensor with samples along its first "
                        f"dimension, not {type(batch).__name__}")
    return first.shape[0]


def cut(batch: Any, stop: int, start: int = 0) -> Any:
    """Samples start:stop of a batch."""
    return _of_each(batch, lambda v: v[start:stop])


def taken(batch: Any, rows: Sequence[int]) -> Any:
    """These samples of a batch, in this order; IndexError for one that it has not."""
    return _of_each(batch, lambda v: v.index_select(0, torch.tensor(rows, device=v.device)))


def _of_each(batch: Any, pick: Callable[[Tensor], Tensor]) -> Any:
    """The batch with `pick` of every tensor that has one entry for each sample."""
    whole = size(batch)

    def some(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {k: some(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return type(v)(some(x) for x in v)
        return pick(v) if isinstance(v, Tensor) and v.dim() and v.shape[0] == whole else v

    return some(batch)


def repeated(batch: Any, times: int, samples: int | None = None) -> Any:
    """Every sample so many times, one after the other; what has no entry for each stays."""
    whole = size(batch) if samples is None else samples

    def some(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {k: some(x) for k, x in v.items()}
        if isinstance(v, list | tuple):
            return type(v)(some(x) for x in v)
        return v.repeat_interleave(times, 0) \
            if isinstance(v, Tensor) and v.dim() and v.shape[0] == whole else v

    return some(batch)


def moved(batch: Any, device: Any) -> Any:
    """The batch on another device."""
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(moved(v, device) for v in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def singly(batch: Any) -> Iterator[Any]:
    """Its samples, one by one."""
    return (cut(batch, i + 1, i) for i in range(size(batch)))
