"""The data pass: what methods read before they start.

Runs the model as it was found (evaluation mode, adapters off) over the calibration batches and
feeds the statistics that a part asked for. Places that are given the very same tensor share one
statistic (q, k and v; gate and up). Statistics are gathered in rounds that fit a budget of bytes,
and each is handed over as soon as its round is done: for those that need an (in, in) matrix, one
layer at a time is enough. Statistics of weights need no data: each is shown its weight, one weight
at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.choose.observe import Statistic
from ..core.batches import cut, inputs, singly, size
from ..core.errors import ConfigError, DataError
from ..core.method import Method
from ..core.site import Place

Seen = dict[Place, Statistic]
Decided = Mapping[Place, dict[str, Any]]


class Batches:
    """Calibration batches that can be read again: what was taken is kept."""

    def __init__(self, source: Iterable[Any] | None):
        self._rest: Iterator[Any] | None = None if source is None else iter(source)
        self._taken: list[Any] = []

    def __bool__(self) -> bool:
        return self._rest is not None

    def one_by_one(self) -> Iterator[Any]:
        """Batches of one sample each."""
        for batch in self._all():
            yield from singly(batch)

    def first(self, samples: int | None) -> Iterator[Any]:
        """Batches until `samples` samples have come; the last is cut. None: all there are."""
        left = samples
        for batch in self._all():
            if left is not None:
                if left <= 0:
                    return
                n = size(batch)
                batch = cut(batch, left) if n > left else batch
                left -= n
            yield batch

    def _all(self) -> Iterator[Any]:
        yield from self._taken
        assert self._rest is not None
        for batch in self._rest:
            self._taken.append(batch)
            yield batch


def valid_tokens(batch: Any) -> Tensor | None:
    """(batch, tokens), True where a token counts: attended to and, where labels stand per token,
    learnt from."""
    right = batch[1] if isinstance(batch, tuple) and len(batch) > 1 else None
    batch = inputs(batch)
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels", right)
    out = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point() \
            and (out is None or out.shape == labels.shape):
        learnt = labels != -100
        if bool(learnt.any()):
            out = learnt if out is None else out & learnt
    return out


def needs_data(statistic: Statistic) -> bool:
    """Does it read what passes the model?"""
    return statistic.reads != "weight"


def no_data(part: Method) -> ConfigError:
    """Of a part that reads data where none was given."""
    return ConfigError(f"{part.name} reads data before it starts: give "
                       "tune(..., calibration=batches), an iterable of training batches")


@contextmanager
def as_found(model: nn.Module, base: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Evaluation mode, the caller's random numbers left alone, every flag put back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), base():
            yield
    finally:
        for m, was in modes.items():
            m.training = was


class Pass:
    """One part's data pass.

    run: ``run(batch)`` is the model's answer to a batch, ``run(batch, loss=True)`` its loss.
    base: a context inside which the model is the base, whatever adapters it has.
    budget: bytes of statistics at a time; at least one is always gathered.
    weight: a context inside which the weight of a place stands, as (out, in).
    """

    def __init__(self, model: nn.Module, part: Method, places: list[Place], batches: Batches,
                 run: Callable[..., Any], base: Callable[[], AbstractContextManager] = nullcontext,
                 budget: int | None = None,
                 weight: Callable[[Place], AbstractContextManager[Tensor]] | None = None):
        self.base, self.weight = base, weight
        self.model, self.part, self.batches, self.run = model, part, batches, run
        self.wanted: Seen = {p: s for p in places if (s := part.observe(p)) is not None}
        self.budget = budget if budget is not None else \
            sum(p.numel() * p.element_size() for p in model.parameters()) // 8
        self.samples: int | None = getattr(part, "samples", None)
        self.alike: dict[Place, Place] = {}          # place -> the one that reads for it

    def rounds(self) -> Iterator[tuple[Seen, Decided]]:
        """({place: its statistic}, what the part decided from them), a round at a time, until
        every place has had its turn."""
        if not self.batches and any(map(needs_data, self.wanted.values())):
            raise no_data(self.part)
        with as_found(self.model, self.base):
            self._group()
            if self.wanted and all(s.condenses for s in self.wanted.values()):
                yield self._condensed()
                return
            together = type(self.part).settle is not Method.settle
            for places in self._split(together):
                seen = self._read(places)
                yield seen, self.part.settle(seen)
                del seen                             # before the next round's stand

    def _condensed(self) -> tuple[Seen, Decided]:
        """Rounds that keep little of what was gathered: after each the part is asked about all
        places, those that are still to come too."""
        seen: Seen = dict(self.wanted)
        decided: Decided = {}
        for places in self._split(False):
            self._read(places, settles=False)
            decided = self.part.settle(seen)
        return seen, decided

    # -- which places share ------------------------------------------------------------------
    def _group(self) -> None:
        """One batch tells which places are given the same tensor."""
        self.alike = {p: p for p in self.wanted}
        reads = {p: s for p, s in self.wanted.items() if s.reads == "input"}
        if not reads:
            return
        batch = next(self.batches.first(self.samples), None)
        if batch is None:
            raise DataError(f"{self.part.name} reads data before it starts, and calibration holds "
                            "no batch")
        given: dict[int, tuple[Any, int, int]] = {}    # id -> (tensor, version, its number)
        calls: dict[Place, list[int]] = {p: [] for p in reads}

        def look(place: Place, x: Tensor) -> None:
            ref, version, number = given.get(id(x), (None, -1, -1))
            if ref is None or ref() is not x or version != x._version:
                number = 1 + max((n for _, _, n in given.values()), default=0)
                given[id(x)] = (weakref.ref(x), x._version, number)
            calls[place].append(number)

        with self._inputs(reads, look), torch.no_grad():
            self.run(batch)
        leaders: dict[Hashable, Place] = {}
        for place, numbers in calls.items():
            if numbers:                              # the same tensors, call by call
                self.alike[place] = leaders.setdefault((tuple(numbers), self.wanted[place].key),
                                                       place)

    def _split(self, together: bool) -> list[list[Place]]:
        leaders = list(dict.fromkeys(self.alike.values()))
        if together:
            return [leaders]
        out: list[list[Place]] = []
        room = -1
        for p in leaders:
            room -= self.wanted[p].nbytes
            turns = self.wanted[p].turns
            if not out or (room < 0 if turns == "budget" else
                           turns == "blocks" and p.block != out[-1][-1].block):
                out.append([])
                room = self.budget - self.wanted[p].nbytes
            out[-1].append(p)
        return out

    # -- one round ---------------------------------------------------------------------------
    def _read(self, leaders: list[Place], settles: bool = True) -> Seen:
        stats: Seen = {p: self.wanted.pop(p) for p in leaders}
        inputs = {p: s for p, s in stats.items() if s.reads in ("input", "ends", "both")}
        gradients = {p: s for p, s in stats.items() if s.reads in ("gradient", "both")}
        seen = {p: stats[lead] for p, lead in self.alike.items() if lead in stats}
        read = self._look(stats)
        if not inputs and not gradients:
            return seen
        alone = any(s.alone for s in stats.values())
        with closing(self._points(gradients)) as points:
            for _ in points:
                for batch in self.batches.first(self.samples):
                    for part in singly(batch) if alone else (batch,):
                        self._feed(part, inputs, gradients, stats, read)
                    if settles:
                        self.part.settle(seen)
                    if all(s.done for s in stats.values() if needs_data(s)):
                        break
        for place in leaders:
            if place not in read:
                raise DataError(f"{self.part.name}: the calibration batches never reach "
                                f"{place.name}; leave it out of targets, or give batches that do")
        return seen

    def _points(self, gradients: Seen) -> Iterator[None]:
        """The weights as they stand, or where the part takes them, one point after another."""
        def loss(batch: Any) -> Tensor:
            return self.part.read_loss(self.model, batch, self.run)

        batches = [] if type(self.part).travel is Method.travel else \
            list(self.batches.first(self.samples))
        with closing(self.part.travel(self.model, batches, loss)) as points:
            for ways in points:
                for place, statistic in gradients.items():
                    stored = place.stored(self.model.get_submodule(place.path))
                    if (way := ways.get(stored)) is not None:        # type: ignore[arg-type]
                        statistic.leads(place.view(way))
                yield

    def _look(self, stats: Seen) -> set[Place]:
        """Show each statistic that asks for it its weight; which places need no data."""
        looked = {p for p, s in stats.items() if not needs_data(s)}
        for place, statistic in stats.items():
            if place in looked or type(statistic).weigh is not Statistic.weigh:
                assert self.weight is not None
                with self.weight(place) as W:
                    statistic.update(W) if place in looked else statistic.weigh(W)
        return looked

    def _feed(self, batch: Any, inputs: Seen, weights: Seen, stats: Seen, read: set) -> None:
        """One pass over a batch."""
        valid = valid_tokens(batch)

        def feed(place: Place, x: Tensor) -> None:
            read.add(place)
            stats[place].update(x, valid)

        def pull(place: Place, g: Tensor) -> None:
            read.add(place)
            stats[place].pull(g)

        def answer(place: Place, y: Any) -> None:
            stats[place].answered(y[0] if isinstance(y, tuple) else y, valid)

        ends = {p: s for p, s in inputs.items() if s.reads == "ends"}
        with self._inputs(inputs, feed), self._outputs(ends, answer), \
                self._gradients(weights, pull):
            if weights:
                with torch.enable_grad():
                    self.part.read_loss(self.model, batch, self.run).backward()
            else:
                with torch.no_grad():
                    self.run(batch)

    @contextmanager
    def _inputs(self, places: Seen, tell: Callable[[Place, Tensor], None]) -> Iterator[None]:
        by_path: dict[str, list[Place]] = {}
        for p in places:
            by_path.setdefault(p.path, []).append(p)
        with ExitStack() as stack:
            for path, here in by_path.items():
                def hook(module: nn.Module, args: tuple, kw: dict,
                         here: list[Place] = here) -> None:
                    x = args[0] if args else next(iter(kw.values()))
                    for p in here:
                        tell(p, x)

                module = self.model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def _outputs(self, places: Seen, tell: Callable[[Place, Any], None]) -> Iterator[None]:
        with ExitStack() as stack:
            for place in places:
                def hook(module: nn.Module, args: tuple, out: Any, place: Place = place) -> None:
                    tell(place, out)

                module = self.model.get_submodule(place.path)
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    @contextmanager
    def _gradients(self, places: Seen, tell: Callable[[Place, Tensor], None]) -> Iterator[None]:
        by_tensor: dict[nn.Parameter, list[Place]] = {}
        for p in places:
            tensor = p.stored(self.model.get_submodule(p.path))
            if not isinstance(tensor, nn.Parameter):
                raise ConfigError(f"{self.part.name} reads the gradient of {p.name}, which a "
                                  "storage holds in another form; name it in the recipe that is "
                                  "given to tune, where the weight is still whole")
            by_tensor.setdefault(tensor, []).append(p)
        with ExitStack() as stack:
            for tensor, here in by_tensor.items():
                def hook(t: Tensor, here: list[Place] = here) -> None:
                    g, t.grad = t.grad, None         # one gradient stands at a time
                    for p in here:
                        tell(p, p.view(g))

                stack.callback(tensor.requires_grad_, tensor.requires_grad)
                tensor.requires_grad_(True)
                handle = tensor.register_post_accumulate_grad_hook(hook)
                stack.callback(handle.remove)
            yield
