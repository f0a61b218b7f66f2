"""Around a forward and backward: parts of a recipe that look first, or go elsewhere to look.

A *pass* is the forward and backward of one micro-batch, whoever's loop makes it. A handler with
``around_step(step)`` is a generator that yields once, and the pass is made where it yields::

    def around_step(self, step):
        found = step.probe()              # the same pass, and nothing has happened
        with elsewhere(found):            # whatever the pass is to meet
            yield                         # the pass: its gradients are the step's

The same body is driven by ``tuned.step``, ``tuned.backward``, ``burnish.fit``, simulation and
measurement. Parts stand inside each other by phase, then in written order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..blocks.weight.term import Wrap
from ..core.caches import without_cache
from ..core.draw import random_kept
from ..core.errors import ConfigError
from .buffers import movable
from .objectives import Run
from .slot import slots

if TYPE_CHECKING:
    from .tuned import Tuned


#: the passes of a micro-batch's samples, one by one
Each: TypeAlias = Callable[[], Iterable[Callable[[], Tensor]]]
#: samples of the micro-batch -> `whole`, `alone` and `each` of those alone
Some: TypeAlias = Callable[[Sequence[int]],
                           tuple[Callable[[], Tensor], Callable[[], Tensor], "Each | None"]]


@dataclass(frozen=True)
class Probe:
    """What a pass found that left no trace.

    loss: the task's, detached.  grads: name of a trained tensor -> its gradient, the objectives'
    included; tensors that got none are left out.
    """

    loss: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)


class Pass:
    """What a handler is given that stands around a pass.

    index: of the update, from 0 on (micro-batches of one update share it).
    scale: what the loss of the loop is multiplied by on its way back.
    whole: forward and backward as they will be made.
    """

    def __init__(self, tuned: Tuned, whole: Callable[[], Tensor], alone: Callable[[], Tensor],
                 each: Each | None = None, scale: Any = 1.0, some: Some | None = None):
        self._tuned, self.whole, self._alone, self._each = tuned, whole, alone, each
        self._some, self._narrowed = some, False
        self.index, self.scale = tuned.steps.timeline.step, scale
        self._after: Callable[[], None] | None = None

    def apart(self, after: Callable[[], None]) -> None:
        """The pass is made sample by sample: each has the loss it has alone, at no scale. `after`
        is called when the gradients of one are complete, and leaves none in ``.grad``."""
        if self._each is None:
            raise ConfigError(
                f"{self._tuned.recipe} makes a pass for each sample, and this loop makes one for "
                "all: call tuned.backward(batch, loss) (or tuned.step, burnish.fit), or give "
                "tuned.around(..., each=...)")
        self._after = after

    def narrow(self, rows: Sequence[int]) -> None:
        """From here on the pass, and whatever is probed, is made of these samples of the
        micro-batch, in this order; its loss is their mean and weighs in the update what the whole
        micro-batch's would. Once a pass."""
        if self._some is None:
            raise ConfigError(
                f"{self._tuned.recipe} chooses among the samples of a pass, and this loop makes "
                "one of all: call tuned.backward(batch, loss) (or tuned.step, burnish.fit), or "
                "give tuned.around(..., some=...)")
        if self._narrowed or not rows or len(set(rows)) < len(rows):
            raise ConfigError(f"a pass is narrowed once, to samples that are told apart; got "
                              f"{list(rows)}")
        self._narrowed = True
        self.whole, self._alone, self._each = self._some(rows)

    def made(self) -> Tensor:
        """The pass itself; the loss, of samples their mean."""
        if self._after is None or self._each is None:
            return self.whole()
        losses = []
        for one in self._each():
            losses.append(one())
            self._after()
        if losses:
            return torch.stack(losses).mean()
        self._tuned.steps.nothing_came()
        return torch.zeros(())

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains just now, by name."""
        return dict(self._tuned.named_parameters())

    def probe(self, grads: bool = True, statistics: bool = False, evaluate: bool = False,
              of: Callable[[Run], Tensor] | None = None) -> Probe:
        """This pass, made and undone; see :meth:`burnish.Tuned.probe`. Gradients have the scale of
        the loop's loss (a share of the accumulation, a loss scale). evaluate: in evaluation mode.
        of: another scalar of the forward in place of the loss and of the objectives.
        """
        with _evaluating(self._tuned.model) if evaluate else nullcontext(), \
                nullcontext() if of is None else self._instead(of):
            return probe(self._tuned, self.whole if grads else self._alone, grads, statistics)

    def loss(self) -> Tensor:
        """The loss of this pass's forward alone, with a graph where the caller wants one; no event
        is sent, and gradients and random generators stay as they were."""
        with _untouched(self._tuned):
            return self._alone()

    def _instead(self, of: Callable[[Run], Tensor]) -> Any:
        return self._tuned.state.riding.replaced(
            lambda args, kw, out, given: of(Run(self._tuned, args, kw, given, dict).ended(out)))

    def damped(self, paths: Iterable[str], factor: float) -> AbstractContextManager[int]:
        """Inside, what the active adapter adds within these modules counts `factor` times; a
        function of W, which has no such form but at 0, as it is. Gives how many updates and
        branches."""
        return damped(self._tuned, paths, factor)

    def updated(self, grads: dict[str, Tensor]) -> Any:
        """Inside, the weights stand where one update with these gradients takes them; then weights
        and moments are back, bit for bit. Gives the weights as they were, by name, on the host.

        The optimizer's own step from its present state, tensor by tensor, so that state is made
        for one tensor at a time, at the rate its schedule started from (a warm-up begins at none);
        no event is sent, nothing is clipped. Takes `grads` over.
        """
        return _updated(self._tuned, grads)

    def unmoved(self) -> Any:
        """Inside, running statistics are not moved: for a pass elsewhere than at the weights."""
        return statistics_kept(self._tuned.model)


@contextmanager
def damped(tuned: Tuned, paths: Iterable[str], factor: float) -> Iterator[int]:
    """See :meth:`Pass.damped`."""
    state, name = tuned.state, tuned.active.name
    inside = tuple(f"{p}." for p in paths)
    parts = [p for path, _, slot in slots(tuned.model) for p in slot.parts
             if p.adapter == name and f"{path}.".startswith(inside)
             and (p.place is not None or p.branch is not None)
             and not (factor and isinstance(slot.module_of(p), Wrap))]
    was = [p.damp for p in parts]
    try:
        for p in parts:
            p.damp = factor * p.damp
        state.changed()
        yield len(parts)
    finally:
        for p, damp in zip(parts, was, strict=True):
            p.damp = damp
        state.changed()


@contextmanager
def dropped(tuned: Tuned, blocks: int) -> Iterator[None]:
    """Inside, so many blocks of each stack, from the first, answer without what the active adapter
    adds there (AdapterDrop): what several tasks share is the same for all then, and may run once.
    It holds for all threads, and a backward belongs inside.

    Raises ConfigError for more blocks than the shortest stack has.
    """
    tuned.check_ready()
    runs = tuned.anatomy.runs()
    most = min(map(len, runs), default=0)
    if not 0 <= blocks <= most:
        raise ConfigError(f"dropped({blocks}): expected 0 to {most} of the repeated blocks")
    with damped(tuned, (b.path for run in runs for b in run[:blocks]), 0.0):
        yield


def probe(tuned: Tuned, run: Callable[[], Tensor], grads: bool, statistics: bool) -> Probe:
    """One pass that leaves no trace but what it found."""
    with _untouched(tuned), without_cache(tuned.model), ExitStack() as stack:
        if not statistics:
            stack.enter_context(statistics_kept(tuned.model))
        with torch.enable_grad() if grads else torch.no_grad():
            loss = run().detach()
        found = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    return Probe(loss, found)


@contextmanager
def _untouched(tuned: Tuned) -> Iterator[None]:
    """Inside, a pass sends no event and steps nothing. Afterwards gradients that waited for an
    update are back, and random generators and the account of objectives stand where they stood."""
    params = [p for p in tuned.model.parameters() if p.grad is not None or p.requires_grad]
    aside = [p.grad for p in params]
    steps, riding = tuned.steps, tuned.state.riding
    optimizer, objectives = steps.optimizer, steps.objectives
    ridden, seen = riding.ridden, getattr(objectives, "_seen", False)
    was, steps.still = steps.still, True
    muted = getattr(optimizer, "muted", None)
    if muted is not None:
        optimizer.muted = True                       # it would step inside this backward
    for p in params:
        p.grad = None
    try:
        with random_kept():
            yield
    finally:
        for p, g in zip(params, aside, strict=True):
            p.grad = g
        steps.still, riding.ridden = was, ridden
        if objectives is not None:
            objectives._seen = seen
        if muted is not None:
            optimizer.muted = muted


@contextmanager
def _updated(tuned: Tuned, grads: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    params, kept = dict(tuned.named_parameters()), dict[str, Tensor]()
    scale = tuned.state.riding.rest()
    tuned.steps.follow()                             # each state is put back as it was found
    try:
        with _untouched(tuned), _first_rates(tuned.steps.optimizer), torch.no_grad():
            while grads:
                name, g = grads.popitem()
                p = params[name]
                kept[name] = p.detach().to("cpu", copy=True)
                p.grad = g if scale == 1 else g / scale
                del g
                _step_alone(tuned.steps.optimizer, p)
        yield kept
    finally:
        with torch.no_grad():
            for name, was in kept.items():
                params[name].copy_(was)


def _step_alone(optimizer: Any, p: nn.Parameter) -> None:
    """Step the one tensor that has a gradient, on a copy of its state."""
    own = optimizer.state.get(p)
    if own:
        optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}
    try:
        optimizer.step()
    finally:
        p.grad = None
        optimizer.state.pop(p, None)
        if own is not None:
            optimizer.state[p] = own


@contextmanager
def _first_rates(optimizer: Any) -> Iterator[None]:
    rates = [(g, g["lr"]) for g in optimizer.param_groups]
    try:
        for group, rate in rates:
            group["lr"] = group.get("initial_lr", rate)
        yield
    finally:
        for group, rate in rates:
            group["lr"] = rate


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside, copies stand for the buffers that a forward may move; then they are themselves."""
    copies = {id(b): b.detach().clone() for _, b in movable(model)} if _trains(model) else {}
    put = [(m._buffers, leaf, b) for m in model.modules() for leaf, b in m._buffers.items()
           if id(b) in copies]
    for home, leaf, b in put:
        home[leaf] = copies[id(b)]
    try:
        yield
    finally:
        for home, leaf, b in put:
            home[leaf] = b


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode, also where a trainer's own pass asks for training mode first."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    was = model.__dict__.get("train")            # that of a look around this one
    model.__dict__["train"] = lambda mode=True: model
    try:
        yield
    finally:
        model.__dict__.pop("train")
        if was is not None:
            model.__dict__["train"] = was
        for m in training:
            m.training = True


def _trains(model: nn.Module) -> bool:
    return any(m.training for m in model.modules())
