from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.update.regulated import Regulation, adapted, at
from ...blocks.weight.clustered import clusters
from ...core.errors import ConfigError
from ...core.method import Method, setting

#: axes whose parts bring a backward of their own, or run again in backward
BY_HAND = {"storage", "delta", "branch", "side", "activations", "mixture"}
#: loss(outputs, batch) -> scalar
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Gram(Method):
    """GRAM: a prompt's start and a gate of its gradients are learned so that few steps go far.

        inner   g = grad L_support(theta),   theta' = theta - inner_rate Psi(g)
        outer   (theta, phi) <- (theta, phi) - meta_rate grad sum over tasks of L_query(theta')
        Psi(g) = 2 sigmoid(g W^T + b) * g,   phi = (W, b), number by number in rows of width d

    A task has its support from one pseudo-domain and its query from another, so that what helps in
    one place has to help in others. Then a small target set is tuned from theta, with Psi, frozen,
    on every gradient::

        method = burnish.parse("gram")[0]
        psi = method.lifecycle(tuned, rounds, loss)          # rounds: lists of (support, query)
        optimizer = tuned.optimizer(lr=2e-3)
        with psi.regulating(optimizer):
            tuned.step(batch, loss)

    ``method.tasks(features, n)`` mines tasks: it clusters the features of unlabelled image-text
    pairs (both encoders', side by side) and gives indices, support and query of different clusters.

    theta is all that the recipe trains (`coop`, `vpt`, ...). Start: Psi(g) = g, so with
    ``inner_updates=0`` it is descent on the queries. Learns d^2 + d beside the prompt, for each
    width. ``order="second"`` keeps the graph of the inner gradients (attention runs without fused
    kernels, which have no second derivative), "first" takes them as numbers: half the
    memory. Updates and branches (lora, houlsby) have a backward of their own, without a derivative:
    they need order="first".

    (unconfirmed: the equations are the best reading of the paper, whose code is not public; the
    gate's factor 2 makes its start the identity.)
    """

    paper: ClassVar[str] = ("Gradient-Regulated Meta-Prompt Learning for Generalizable "
                            "Vision-Language Models, ICCV 2023, arXiv:2303.06571")
    tier: ClassVar[str] = "from the text"

    inner_rate: float = setting(0.01, "of a step on a task's support")
    inner_updates: int = setting(1, "steps on a task's support")
    meta_rate: float = setting(1e-3, "of a step on the tasks' queries")
    order: Literal["second", "first"] = setting("second", "of the derivatives that go outward")
    domains: int = setting(8, "clusters that tasks are mined from")

    def __post_init__(self) -> None:
        if self.inner_rate < 0 or self.meta_rate < 0 or self.inner_updates < 0:
            raise ConfigError("gram: rates and inner_updates are at least 0, got "
                              f"{self.inner_rate:g}, {self.meta_rate:g} and {self.inner_updates}")
        if not self.inner_updates and self.order != type(self).order:
            raise ConfigError(f"gram: order={self.order!r} says how the outer derivative passes a "
                              "step on the support, and inner_updates=0 has none: leave one of "
                              "them out")
        if self.domains < 2:
            raise ConfigError(f"gram: support and query are of different domains: at least 2, not "
                              f"{self.domains}")

    def query(self, tuned: Any, psi: Regulation, support: Any, query: Any,
              loss: Loss | None = None) -> Tensor:
        """L_query(theta'), a function of what trains and of Psi."""
        theta, second = dict(tuned.named_parameters()), self.order == "second"
        own = [m.name for m in tuned.recipe if BY_HAND & set(m.axes())]
        if second and self.inner_updates and own:
            raise ConfigError(f"gram: the backward of {' and '.join(own)} is written by hand and "
                              "has no derivative of its own; order='first' does without, and "
                              "prompts (vpt, prefix, ...) and base weights have one")
        there = adapted(tuned.model, theta, lambda: tuned.loss(support, loss), psi,
                        self.inner_rate, self.inner_updates, second)
        return at(tuned.model, there, lambda: tuned.loss(query, loss))

    def lifecycle(self, tuned: Any, rounds: Iterable[Sequence[tuple[Any, Any]]],
                  loss: Loss | None = None, *, psi: Regulation | None = None) -> Regulation:
        """Psi after an outer step for each of `rounds`, lists of (support, query) batches; what
        trains has moved with it. psi: go on from this one, which learns meanwhile."""
        theta = list(tuned.parameters())
        if not theta:
            raise ConfigError("gram: nothing trains just now; tuned.use(name) for one adapter "
                              "alone")
        psi = Regulation(dict(tuned.named_parameters())) if psi is None else psi
        psi.check(dict(tuned.named_parameters()))
        moved = [*theta, *psi.requires_grad_(True).parameters()]
        try:
            for number, tasks in enumerate(rounds, 1):
                total = [torch.zeros_like(p) for p in moved]
                for support, query in tasks:
                    value = self.query(tuned, psi, support, query, loss)
                    if not bool(value.detach().isfinite()):
                        raise ConfigError(f"gram: the loss of a query is {float(value.detach())} "
                                          f"in round {number}, which has moved nothing; take a "
                                          "smaller inner_rate")
                    for t, g in zip(total, torch.autograd.grad(value, moved, allow_unused=True),
                                    strict=True):
                        if g is not None:
                            t += g
                with torch.no_grad():
                    for p, t in zip(moved, total, strict=True):
                        p.sub_(t, alpha=self.meta_rate)
        finally:
            psi.requires_grad_(False)
        return psi

    def tasks(self, features: Tensor, samples: int, seed: int = 0
              ) -> Iterator[tuple[Tensor, Tensor]]:
        """Without end: (indices of a support, indices of a query), `samples` each (or what a
        domain has), of different domains of these features (n, d)."""
        of = clusters(features, self.domains, seed=seed)
        known = [torch.nonzero(of == k).flatten() for k in of.unique().tolist()]
        if len(known) < 2:
            raise ConfigError(f"gram: {len(features)} samples fall into one domain; more samples, "
                              "or other features")
        g = torch.Generator().manual_seed(seed)
        while True:
            a, b = torch.randperm(len(known), generator=g)[:2].tolist()
            yield tuple(known[i][torch.randperm(len(known[i]), generator=g)[:samples]]
                        for i in (a, b))                     # type: ignore[misc]
