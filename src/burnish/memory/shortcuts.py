"""What a simulation does otherwise than a real run, each with its reason."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .ledger import COUNTS, Entry, Ledger


@contextlib.contextmanager
def values_are_known() -> Iterator[None]:
    """transformers never looks at the values of fake masks ("tracing") and then builds the full
    mask, where a real run sees that nothing is padded and takes the fused kernel. Here the values
    are known, so its question is answered as in a real run."""
    if "transformers" not in sys.modules:
        yield
        return
    try:
        from transformers import masking_utils
    except ImportError:                       # a version without it has no such question
        yield
        return
    asked = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = asked


@contextlib.contextmanager
def tables_forgotten() -> Iterator[None]:
    """Whatever blocks and methods cached while tensors were fake is dropped: a fake table would
    spoil the next real step."""
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            if name.startswith(("burnish.blocks.", "burnish.methods.")):
                for value in list(vars(module).values()):
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A fake operator that fails logs its own stack before the error says the same."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def collector_waits() -> Iterator[None]:
    """The collector of cycles looks through every note and module again and again, and when it
    comes has nothing to do with the step: whatever it would free at some operator stays."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def shapes_aside() -> Iterator[None]:
    """What torch asks of fake tensors, to learn an operator's result on shares (DTensors) the first
    time that it meets it, is no memory of the step."""
    try:
        from torch.distributed.tensor._sharding_prop import ShardingPropagator as Propagator
    except ImportError:                       # torch without distributed
        yield
        return
    from torch.utils._python_dispatch import _disable_current_modes

    original = Propagator._propagate_tensor_meta_non_cached

    def asked(self: Any, *args: Any, **kw: Any) -> Any:
        with _disable_current_modes():
            return original(self, *args, **kw)

    Propagator._propagate_tensor_meta_non_cached = asked     # type: ignore[method-assign]
    try:
        yield
    finally:
        Propagator._propagate_tensor_meta_non_cached = original  # type: ignore[method-assign]


@contextlib.contextmanager
def quick_noise(ledger: Ledger) -> Iterator[None]:
    """A draw from the portable stream is a few hundred small operators per panel and the same ones
    every time. Each size is drawn once in full; after that its result, the highest moment inside it
    and its cost are entered as one event."""
    from ..blocks.update.noise import _PANEL, PortableNoise

    original = PortableNoise._draw
    known: dict[Any, tuple[int, dict[str, tuple[float, ...]]]] = {}

    def draw(self: PortableNoise, n: int, offset: int, turn: int, device: Any, lanes: int,
             finish: Any, dtype: torch.dtype) -> torch.Tensor:
        if not ledger.now:                    # while the recipe is joined nobody watches
            return torch.empty(n, dtype=dtype, device=device)
        key = min(n, lanes * _PANEL), lanes, dtype, offset % lanes
        if key not in known:
            first, before = len(ledger.entries), _costs(ledger)
            out = original(self, min(n, lanes * _PANEL), offset, turn, device, lanes, finish, dtype)
            inside = _highest(ledger.entries[first:], ledger.now) - out.untyped_storage().nbytes()
            known[key] = inside, {c: tuple(b - a for a, b in zip(before[c], after, strict=True))
                                  for c, after in _costs(ledger).items()}
            if n == out.numel():
                return out
            del out
        inside, costs = known[key]
        out = torch.empty(n, dtype=dtype, device=device)
        ledger.transient(inside, out.device.type)
        for name, parts in costs.items():
            column = getattr(ledger, name)
            for phase, part in zip(column, parts, strict=True):
                column[phase] += part * n / key[0]
        return out

    PortableNoise._draw = draw                 # type: ignore[method-assign]
    try:
        yield
    finally:
        PortableNoise._draw = original         # type: ignore[method-assign]


def _costs(ledger: Ledger) -> dict[str, tuple[float, ...]]:
    return {name: tuple(getattr(ledger, name).values())
            for name in COUNTS}


def _highest(entries: list[Entry], now: int) -> int:
    """The most that these entries held at once, up to event `now`."""
    change: dict[int, int] = {}
    for e in entries:
        change[e.birth] = change.get(e.birth, 0) + e.bytes
        death = now + 1 if e.death is None else e.death
        change[death] = change.get(death, 0) - e.bytes
    live = top = 0
    for event in sorted(change):
        live += change[event]
        top = max(top, live)
    return top


@contextlib.contextmanager
def quick_strips(ledger: Ledger) -> Iterator[None]:
    """A kernel delta works strip by strip, and every strip takes the same operators. Two are run;
    what the second cost and left behind stands for each of the others."""
    from ..blocks.weight.tiled import KernelDelta

    original = KernelDelta._strips

    def strips(self: KernelDelta, i0: int, i1: int) -> Iterator[tuple[int, int]]:
        spans = list(original(self, i0, i1))
        if len(spans) < 3:
            yield from spans
            return
        first = len(ledger.entries)
        yield spans[0]
        left, before = _alive(ledger.entries[first:]), _costs(ledger)
        yield spans[1]
        more = max(0, _alive(ledger.entries[first:]) - left)
        share = (i1 - spans[1][1]) / (spans[1][1] - spans[1][0])
        _again(ledger, before, share)
        filler = torch.empty(round(more * share), dtype=torch.uint8, device=self.A.device)
        del filler

    KernelDelta._strips = strips              # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelDelta._strips = original        # type: ignore[method-assign]


@contextlib.contextmanager
def quick_distances(ledger: Ledger) -> Iterator[None]:
    """Distances of a strip are some dozen passes over buffers that are there already: nothing is
    made, so of each size and phase they are run once, and counted after that."""
    from ..blocks.weight.distance import Distances

    original = Distances.of
    known: dict[Any, dict[str, tuple[float, ...]]] = {}

    def of(self: Distances, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.by_features:
            return original(self, a, b)
        shape = self.Bt.shape                 # made by whoever asks first
        key = ledger._phase(), b - a, shape, self.A.dtype
        if key not in known:
            before = _costs(ledger)
            out = original(self, a, b)
            known[key] = {c: tuple(y - x for x, y in zip(before[c], after, strict=True))
                          for c, after in _costs(ledger).items()}
            return out
        for name, parts in known[key].items():
            column = getattr(ledger, name)
            for phase, part in zip(column, parts, strict=True):
                column[phase] += part
        return self._room[0, : b - a], self._room[1, : b - a]

    Distances.of = of                         # type: ignore[method-assign]
    try:
        yield
    finally:
        Distances.of = original               # type: ignore[method-assign]


@contextlib.contextmanager
def quick_runs(ledger: Ledger) -> Iterator[None]:
    """Panels of a product, strips of an update or of noise and chunks of a loss are of one size but
    for the last, and take the same operators. The first two and the last are run; where the second
    leaves nothing behind, its costs stand for those between, and none of them can be a higher
    moment than it was."""
    from ..blocks.tape import chunked
    from ..blocks.update import composed, scratch, subspace, zeroth, zoo
    from ..blocks.weight.panels import Panels

    with contextlib.ExitStack() as undo:
        for owner, name in ((Panels, "ranges"), (composed.Composed, "_slices"),
                            (composed, "panels"), (subspace, "panels"), (chunked, "spans"),
                            (scratch, "strips"), (zeroth, "strips"), (zoo, "strips")):
            original = getattr(owner, name)

            def few(*args: Any, original: Any = original) -> Iterator[tuple[int, int]]:
                return _ends(list(original(*args)), ledger)

            setattr(owner, name, few)
            undo.callback(setattr, owner, name, original)
        yield


@contextlib.contextmanager
def whole_bunches(order: Callable[[list[str]], list[int]]) -> Iterator[None]:
    """Small tensors step together, as many as fill a strip. A model with fewer blocks takes the
    strips of the whole one: `order` says which of its tensors stand in the whole one's list."""
    from ..blocks.update.composed import Composed

    original = Composed._alike

    def alike(self: Composed, found: list[Any]) -> list[Any]:
        return [found[n] for n in order([name for _, _, _, name, _ in found])]

    Composed._alike = alike                   # type: ignore[method-assign]
    try:
        yield
    finally:
        Composed._alike = original            # type: ignore[method-assign]


def _ends(spans: list[tuple[int, int]], ledger: Ledger) -> Iterator[tuple[int, int]]:
    """The first two and the last of many, all of them where the second is not like the next."""
    if len(spans) < 4:
        yield from spans
        return
    first = len(ledger.entries)
    yield spans[0]
    left, before = _alive(ledger.entries[first:]), _costs(ledger)
    yield spans[1]
    if _alive(ledger.entries[first:]) != left:
        yield from spans[2:]
        return
    _again(ledger, before, len(spans) - 3)
    yield spans[-1]


def _again(ledger: Ledger, before: dict[str, tuple[float, ...]], times: float) -> None:
    """What was counted since `before` is counted so many times more."""
    for name, parts in before.items():
        column = getattr(ledger, name)
        for (phase, now), was in zip(list(column.items()), parts, strict=True):
            column[phase] = now + (now - was) * times


def _alive(entries: list[Entry]) -> int:
    return sum(e.bytes for e in entries if e.death is None)
