"""A model that is adapted while it answers: its source is kept once, and comes back bit for bit.

    with Adapting("tent", model, params, loss, rule, lr=1e-3) as adapted:
        for batch in stream:
            outputs = adapted(batch)
        adapted.reset()                          # the source again, and moments from nothing

For every batch: `updates` times a forward, ``loss(outputs)`` and a step of `rule` on `params`. The
outputs are those of the last forward, before its step, or with ``after=True`` of another forward
after it. episodic: every batch begins at the source, so none has a say in another's answer.

The model runs in evaluation mode; gradients are taken of `params` alone, no ``.grad`` is touched
and no random number drawn. Steps are made in fp32 or wider, on copies that the stream goes on from
where the model is held in less. Whatever the stream did, leaving gives back the parameters, modes
and flags that were there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.errors import BurnishError, CheckError, ConfigError, FormatError
from ..state.answers import detached
from ..state.batch_statistics import mixed_statistics
from ..state.taps import evaluating
from .rules import AdamW, accumulator, move

Loss = Callable[[Any], "Tensor | None"]


class Part(Protocol):
    """What acts in the model beside the steps, and keeps something from batch to batch."""

    def begin(self) -> None:
        """What it keeps is as before the first batch."""

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...

    def asked(self) -> AbstractContextManager[None]:
        """Around one batch. What leaves it by an exception has kept nothing."""


@contextmanager
def asking(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, these and no other parameters of the model ask for a gradient."""
    mine = {id(p) for p in params}
    was = [(p, p.requires_grad) for p in model.parameters() if p.is_leaf]
    try:
        for p, _ in was:
            p.requires_grad_(id(p) in mine)
        yield
    finally:
        for p, asks in was:
            p.requires_grad_(asks)


class Adapting:
    """See the module. loss: of a forward's outputs; None where this batch asks for no step.
    finish: what is answered, made of the outputs.  alpha: share of what batch norms remember
    (blocks/state/batch_statistics.py)."""

    def __init__(self, who: str, model: nn.Module, params: Mapping[str, nn.Parameter] | None = None,
                 loss: Loss | None = None, rule: Any = None, *, lr: float = 1e-3, updates: int = 1,
                 episodic: bool = False, after: bool = False, alpha: float = 1.0,
                 finish: Callable[[Any], Any] = lambda out: out,
                 hooks: Callable[[], list[Any]] = list):
        self.who, self.model, self.params = who, model, dict(params or {})
        self.loss, self.rule, self.lr = loss, rule or AdamW(weight_decay=0.0), lr
        self.updates, self.episodic, self.after = updates if self.params else 0, episodic, after
        self.alpha, self.finish, self._hooks = alpha, finish, hooks
        self.parts: list[Part] = []
        self._source = {n: p.detach().clone() for n, p in self.params.items()}
        self._open = False
        self._begin()

    def beside(self, part: Part) -> Adapting:
        """This, with a part that acts in the model meanwhile."""
        self.parts.append(part)
        return self

    # -- the stream ------------------------------------------------------------------------------
    def __call__(self, batch: Mapping[str, Any] | Tensor) -> Any:
        """The outputs for a batch; what trains has moved afterwards."""
        if not self._open:
            raise BurnishError(f"{self.who} adapts inside a with block, whose end gives the source "
                               "back: with ... as adapted: adapted(batch)")
        if self.episodic:
            self.reset()
        out = None
        with self._asked():
            for i in range(self.updates):
                out = self._update(batch, i + 1 == self.updates and not self.after)
            if out is None:
                with torch.no_grad():
                    out = self.finish(self._run(batch))
        return out

    def reset(self) -> None:
        """The source, bit for bit; moments from nothing."""
        with torch.no_grad():
            for name, was in self._source.items():
                self.params[name].copy_(was)
        self._begin()

    def state(self) -> dict[str, Tensor]:
        """Where the stream stands, as tensors that another one goes on from."""
        out = {"steps": torch.tensor(self.steps)}
        for name, x in self._wide.items():
            out[f"value.{name}"] = x.clone()
            out |= {f"{k}.{name}": v.clone() for k, v in self._states[name].items()}
        for i, part in enumerate(self.parts):
            out |= {f"part.{i}.{k}": v for k, v in part.state().items()}
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`. FormatError for that of something else; nothing has changed
        then."""
        mine = self.state()
        if odd := sorted(mine.keys() ^ state.keys()) or [
                k for k in mine if mine[k].shape != state[k].shape]:
            raise FormatError(f"{self.who}: this is the state of another stream: {odd[0]}")
        self.steps = int(state["steps"])
        with torch.no_grad():
            for name, x in self._wide.items():
                x.copy_(state[f"value.{name}"])
                self.params[name].copy_(x)
                for k, v in self._states[name].items():
                    v.copy_(state[f"{k}.{name}"])
            for i, part in enumerate(self.parts):
                part.restore({k: state[f"part.{i}.{k}"] for k in part.state()})

    # -- one batch ------------------------------------------------------------------------------
    def _begin(self) -> None:
        self.steps = 0
        self._wide = {n: p.detach().to(accumulator(p.dtype), copy=True)
                      for n, p in self.params.items()}
        self._states = {n: self.rule.init(x) for n, x in self._wide.items()}
        for part in self.parts:
            part.begin()

    def _run(self, batch: Mapping[str, Any] | Tensor) -> Any:
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(batch)

    def _update(self, batch: Mapping[str, Any] | Tensor, answers: bool) -> Any:
        """A forward and its step; the outputs where they are asked for."""
        with torch.inference_mode(False), torch.enable_grad(), \
                asking(self.model, self.params.values()):
            out = self._run(batch)
            loss = self.loss(out) if self.loss is not None else None
            grads = () if loss is None else self._gradients(loss)
        done = self.finish(detached(out)) if answers else None
        if grads:
            self._step(grads)
        return done

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        if not loss.requires_grad:
            raise ConfigError(f"{self.who}: no gradient reaches {next(iter(self.params))}: the "
                              "part of the model that it stands in runs without a graph")
        grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in (loss.detach(), *grads) if g is not None):
            raise CheckError(f"{self.who}: the loss of this batch or its gradient is not finite; "
                             "nothing was moved")
        return grads

    @torch.no_grad()
    def _step(self, grads: tuple[Tensor | None, ...]) -> None:
        self.steps += 1
        for (name, p), g in zip(self.params.items(), grads, strict=True):
            if g is not None:
                x, state = self._wide[name], self._states[name]
                move(self.rule, [x], [g.to(x.dtype)], {k: [v] for k, v in state.items()},
                     self.steps, self.rule.hyper(), self.lr, self.rule.weight_decay)
                p.copy_(x)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """The model as it is asked: evaluation mode, statistics mixed, hooks on."""
        with evaluating([m for m in self.model.modules() if m.training]), \
                mixed_statistics(self.model, self.alpha), ExitStack() as parts:
            for part in self.parts:
                parts.enter_context(part.asked())
            hooks = self._hooks()
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    # -- around the stream ------------------------------------------------------------------------
    def __enter__(self) -> Adapting:
        self._open = True
        return self

    def __exit__(self, *error: Any) -> None:
        self._open = False
        self.reset()
