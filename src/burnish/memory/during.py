"""The moments of a run, each with a peak of its own: load, train, evaluate, save, merge.

A step is not always the dearest of them. While a recipe is joined, weights stand in the form they
were loaded in and, one after the other, in the form that storage gives them; a merge makes dense
weights of few bits; a file is written from what stands in memory. The same bodies run under the
ledger on fake tensors (the promise) and on real ones (the truth).

load
    reading the model's files (reading.py), and from the loaded model to the tuned one. What reads
    data first, and what a start is computed from (a decomposition of the weight), is not in the
    promise.
evaluate
    the forward in evaluation mode, without gradients.
save, merge
    as on a tuned model whose optimizer is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import call
from .ledger import Ledger
from .report import MemoryReport

#: what evaluation makes of (the model, its answer, the batch)
Read = Callable[[Any, Any, Any], Any] | None
MOMENTS = ("load", "train", "evaluate", "save", "merge")


@contextlib.contextmanager
def watching(model: nn.Module, tuned: Any = None, beside: Iterable[Any] = ()
             ) -> Iterator[list[MemoryReport]]:
    """The ledger on a moment of a real run; the list has its report when the block is over.

    beside: an optimizer's state, which stays where it is meanwhile."""
    ledger, told = Ledger(model), []
    ledger.watch("optimizer", beside)
    with ledger:
        if tuned is not None:
            watch_originals(tuned, ledger)
        yield told
        _settle(model, ledger)
    told.append(read(model, ledger))


def read(model: nn.Module, ledger: Ledger) -> MemoryReport:
    """What the ledger has seen of a real moment."""
    where = next(p.device.type for p in model.parameters())
    return MemoryReport.of(ledger, device=where, source="measured")


def joined(join: Callable[[], Any], ledger: Ledger) -> Any:
    """What `join` makes of ``ledger.model``, watched."""
    assert ledger.model is not None
    with ledger:
        tuned = join()
        watch_originals(tuned, ledger)
        _settle(ledger.model, ledger)
    return tuned


def look(moment: str, tuned: Any, ledger: Ledger, batch: Any, read: Read = None) -> None:
    """One of the moments of a tuned model, watched ("load" is over by then)."""
    if moment == "evaluate":
        evaluated(tuned, ledger, batch, read)
    elif moment == "save":
        saved(tuned, ledger)
    elif moment == "merge":
        merged(tuned, ledger)


def evaluated(tuned: Any, ledger: Ledger, batch: Any, read: Read = None) -> None:
    """Evaluation: no gradients, no tape, no update. Twice where it keeps something: then all of
    that is there from the beginning.

    read: what is made of (the model, its answer, the batch), such as figures of logits."""
    ledger.watch("activations", batch if isinstance(batch, Mapping) else [batch])
    tuned.model.eval()
    with ledger, torch.no_grad():
        watch_originals(tuned, ledger)
        for _ in range(2):
            out = call(tuned.model, batch)
            made = read(tuned.model, out, batch) if read is not None else None
            del out, made
            if not tuned.state.room.held:
                break
            ledger.watch("weights", tuned.state.room.tensors())


def saved(tuned: Any, ledger: Ledger) -> None:
    """All that writing an adapter makes in memory; nothing is written."""
    from ..formats.written import rehearse

    with ledger:
        watch_originals(tuned, ledger)
        rehearse(tuned)


def merged(tuned: Any, ledger: Ledger) -> None:
    """Merging, as far as the merged model."""
    with ledger:
        watch_originals(tuned, ledger)
        tuned.merge()
        _settle(tuned.model, ledger)


def watch_originals(tuned: Any, ledger: Ledger) -> None:
    """Copies of small base tensors that wait in host memory so that detach is exact. Large ones
    wait on disk; and the host is not the device asked for."""
    if ledger.machine in (None, "cpu"):
        ledger.watch("weights", {f"{path}.{name}": kept for (path, name), kept
                                 in tuned.originals.kept.items() if isinstance(kept, Tensor)})


def _settle(model: nn.Module, ledger: Ledger) -> None:
    """What stands in the model at the end is weights, whoever made it."""
    ledger.watch("weights", dict(model.named_parameters()))
    ledger.watch("weights", dict(model.named_buffers()))
