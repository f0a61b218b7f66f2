"""Hyperparameters that move while a run trains, and take steps by the loss of validation rows
(Self-Tuning Networks: methods/delta/lowrank/stn.py has the equations)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..state.taps import evaluating
from ..weight.responding import Responding
from .noise import fold

#: the k-th batch of validation rows, with its loss (None: the model's own)
Held = Callable[[int], tuple[Any, Any]]


class Tuning:
    """Moves u while training, and takes its steps."""

    def __init__(self, method: Any, tuned: Any, terms: Sequence[Responding]):
        self.method, self.tuned, self.terms = method, tuned, list(terms)
        self.shared = terms[0].shared
        self.held: Held | None = None
        self.at: int | None = None                                 # the last update begun
        self.moments, self.taken = torch.zeros(2, 4), 0            # of Adam; steps taken
        self.look: Callable[[Any], Tensor] | None = None           # of the update rehearsed
        self.move(0)

    def hears(self, held: Held) -> None:
        self.held = held

    def drawn(self, key: int) -> Tensor:
        """N(0, 1) for what is tuned, 0 for what is not."""
        g = torch.Generator().manual_seed(fold("tuning", self.method.seed, key))
        return (torch.randn(2, generator=g) * torch.tensor(self.method.tuned)).to(self.shared.u)

    @torch.no_grad()
    def move(self, step: int) -> None:
        """e of an update."""
        self.shared.shift = self.shared.log_sigma.exp() * self.drawn(2 * step)
        self.shared.drop = self.method.values(self.shared.u + self.shared.shift)["dropout"]

    def step_begin(self, step: int) -> None:
        self.move(step)

    def rehearse(self, step: int) -> None:
        self.look = lambda step: step.loss()               # rows like the pass's own

    def looks_at(self, batch: Any, loss: Any) -> None:
        """The update rehearsed looks at these rows instead."""
        self.look = lambda step: self.tuned.loss(batch, loss)

    def around_step(self, step: Any) -> Iterator[None]:
        now, first = step.index, step.index != self.at             # of its micro-batches
        self.at = now
        look, self.look = self.look, None
        if look is not None:                                       # a look, and no step on u
            self.gradient(lambda: look(step), self.shared.log_sigma.exp() * self.drawn(2 * now + 1))
        elif self.held is not None and first and now and now % self.method.turn == 0:
            self.validate(now)
        yield

    def validate(self, now: int) -> None:
        """One step on u and sigma, by a batch of validation rows."""
        assert self.held is not None
        batch, loss = self.held(self.taken)
        e = self.shared.log_sigma.exp() * self.drawn(2 * now + 1)
        g = self.gradient(lambda: self.tuned.loss(batch, loss), e)
        g = torch.stack([g, g * e - self.method.widening])         # log sigma: e = sigma z
        self.follow((g * torch.tensor(self.method.tuned, device=g.device)).flatten())

    def gradient(self, loss: Callable[[], Tensor], e: Tensor) -> Tensor:
        """That of a loss in u, moved by e: in evaluation mode, without the objectives."""
        shared, tuned = self.shared, self.tuned
        before = shared.shift
        shared.shift, shared.probing = e, True
        shared.u.requires_grad_(True)
        try:
            with evaluating([m for m in tuned.model.modules() if m.training]), \
                    tuned.state.riding.collecting():
                value = loss()
            (g,) = torch.autograd.grad(value, shared.u)
        finally:
            shared.u.requires_grad_(False)
            shared.shift, shared.probing = before, False
        return g

    @torch.no_grad()
    def follow(self, g: Tensor) -> None:
        """Adam on (u, log sigma)."""
        self.taken += 1
        m, v = self.moments = self.moments.to(g)
        m.lerp_(g, 0.1)
        v.lerp_(g.square(), 0.001)
        step = m / (1 - 0.9**self.taken) / ((v / (1 - 0.999**self.taken)).sqrt() + 1e-8)
        both = self.method.tuning_rate * step
        self.shared.u -= both[:2]
        self.shared.log_sigma -= both[2:]

    def before_update(self, step: int) -> None:
        """The gradient of the decay, of every term under u + e."""
        decay = self.method.values(self.shared.u + self.shared.shift)["decay"]
        if not decay:
            return
        point = (self.shared.u + self.shared.shift).detach()
        for term in self.terms:
            own = [p for p in term.parameters() if p.requires_grad]
            with torch.enable_grad():
                size = term.A.square().sum() + term.at(point).square().sum()
            grads = torch.autograd.grad(size, own, allow_unused=True)
            for p, g in zip(own, grads, strict=True):
                if g is not None:
                    p.grad = (0.5 * decay * g).to(p.dtype) if p.grad is None else \
                        p.grad.add_(g.to(p.grad.dtype), alpha=0.5 * decay)

    def told(self) -> Mapping[str, float]:
        return {**self.method.values(self.shared.u), "steps": self.taken}

    def state_dict(self) -> Mapping[str, Any]:
        return {"moments": self.moments.clone(), "taken": self.taken,
                "u": self.shared.u.detach().clone(),
                "log_sigma": self.shared.log_sigma.detach().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments, self.taken = state["moments"].clone(), int(state["taken"])
        self.shared.u.copy_(state["u"])
        self.shared.log_sigma.copy_(state["log_sigma"])
        self.move(self.tuned.timeline.step)
