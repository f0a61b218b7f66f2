"""Reading a model's files: what that takes, from their headers and on the real run.

A safetensors file is mapped as a whole while it is read. A tensor that is wanted as it is stored
stays a piece of the mapping and takes nothing more; one that is wanted in another dtype, or put
together from several, is made beside it, and the mapping goes only when the last tensor has been
read. So weights stand in two dtypes at once:

    peak = stored bytes of what is read + bytes of what is made

When all is there transformers asks the modules of its own models whether a weight is still to be
drawn, and so for the weight itself. A module that computes its weight
(``torch.nn.utils.parametrize``: the positional convolution of Wav2Vec2 and its kin) computes it
then, beside all others and the mapping: the most that one such weight takes is added.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrize import is_parametrized

from .fakes import fake_copy
from .ledger import Ledger
from .report import MemoryReport

#: transformers reads in threads of its own, which no ledger sees, unless this says otherwise
_ALONE = "HF_DEACTIVATE_ASYNC_LOAD"


def read_bytes(stored: Mapping[str, Tensor], model: nn.Module) -> int:
    """The peak of reading `stored` into `model`, by shapes and dtypes alone.

    stored: name -> a tensor of the file, on meta. model: as it will be, on meta.

    A tensor belongs to the one of its name, else to one of its shape (libraries rename them). One
    whose name the model has in another shape (a head of other classes) is read and let go.
    """
    left = dict(stored)
    other = 0
    pairs: list[tuple[Tensor, Tensor]] = []
    lacking, new = [], []
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        own = next((n for n in (name, name.partition(".")[2]) if n in left), None)
        if own is not None and left[own].shape != t.shape:
            other += left.pop(own).nbytes
            new.append(t)
        elif own is None:
            lacking.append(t)
        else:
            pairs.append((left.pop(own), t))
    alike: dict[torch.Size, list[str]] = {}
    for n, found in left.items():
        alike.setdefault(found.shape, []).append(n)
    for t in lacking:
        if names := alike.get(t.shape):
            pairs.append((left.pop(names.pop(0)), t))
        else:
            new.append(t)
    taken = sum(found.nbytes for found, _ in pairs)
    made = sum(t.nbytes for found, t in pairs if found.dtype != t.dtype)
    # what is left is joined or cut into what is new; where that is less, it is of another task
    rest = sum(t.numel() for t in left.values())
    if rest <= sum(t.numel() for t in new):
        taken += sum(t.nbytes for t in left.values())
    return taken + other + made + sum(t.nbytes for t in new) + computed_bytes(model)


def computed_bytes(model: nn.Module) -> int:
    """The most that computing one weight of a model of transformers takes, of those that modules
    compute from other tensors; 0 where there are none, or where nobody asks for them: in models of
    others transformers looks at the parameters alone."""
    foreign = getattr(model, "is_custom_code", None)
    if foreign is None or foreign():
        return 0
    chains = [chain for m in model.modules() if is_parametrized(m, "weight")
              for chain in (m.parametrizations["weight"],)]  # type: ignore[union-attr,index]
    return max(map(_computed, chains), default=0)


def _computed(chain: nn.Module) -> int:
    with FakeTensorMode() as mode:
        twin = fake_copy(chain, mode, "cpu")
        ledger = Ledger(twin)
        with ledger, torch.no_grad():
            twin()
    held = sum(t.nbytes for t in (*twin.parameters(), *twin.buffers()))
    return MemoryReport.of(ledger, device="cpu", source="simulated").peak_bytes - held


@contextlib.contextmanager
def reading() -> Iterator[list[MemoryReport]]:
    """The ledger while a library reads a model's files, in one thread; the list has its report when
    the block is over."""
    ledger, told = Ledger(), []
    before = os.environ.get(_ALONE)
    os.environ[_ALONE] = "1"
    try:
        with ledger:
            yield told
    finally:
        if before is None:
            del os.environ[_ALONE]
        else:
            os.environ[_ALONE] = before
    for e in ledger.entries:
        if e.birth == 0 and e.category == "weights":      # pieces of a mapping, which stays
            e.death = None
    told.append(MemoryReport.of(ledger, device="cpu", source="measured"))
