from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...blocks.weight.checkpoints import Checkpoint, facts, mixed, weight_gradients
from ...blocks.weight.taskvector import Rule, Task
from ...core.errors import ConfigError
from ...core.method import Method, setting


def uniform(models: Sequence[Checkpoint]) -> Iterator[tuple[str, Tensor]]:
    """``(1/k) sum theta_i``, tensor by tensor."""
    if not models:
        raise ConfigError("a soup needs at least one checkpoint")
    return mixed(models, lambda name: [1 / len(models)] * len(models))


def greedy(models: int, score: Callable[[tuple[int, ...]], float],
           single: Sequence[float] | None = None) -> tuple[list[int], float]:
    """(which of so many models are in the soup, its score): each stays if the mean is no worse.

    score: held-out quality of the mean of some of them, higher is better. Models are tried by their
    own score, best first (`single` where it is known already); the comparison is >=, so the soup is
    never below the best single model on the held-out data.
    """
    if not models:
        raise ConfigError("a soup needs at least one checkpoint")
    alone = [float(score((i,))) for i in range(models)] if single is None else list(single)
    if len(alone) != models:
        raise ConfigError(f"greedy soup: {models} checkpoints and {len(alone)} scores")
    first, *rest = sorted(range(models), key=lambda i: -alone[i])
    chosen, best = [first], alone[first]
    for i in rest:
        now = float(score((*chosen, i)))
        if now >= best:
            best = now
            chosen.append(i)
    return chosen, best


def learned(model: nn.Module, models: Sequence[Checkpoint], batches: Iterable[tuple[Any, Tensor]],
            loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
            layer: Callable[[str], str] = lambda name: "", epochs: int = 3, lr: float = 0.1,
            ) -> tuple[dict[str, Tensor], float]:
    """(weights (k,) per layer, beta): weights and a logit scale trained on held-out batches.

    ``min_{alpha, beta} sum_j loss(beta f(x_j; sum_i alpha_i theta_i), y_j)``, alpha = softmax of
    free logits, one set for the model or one per ``layer(name)``. beta only scales logits while
    learning. One model and one gradient are in memory (``blocks.weight.checkpoints``).
    """
    keys = sorted({layer(n) for n in models[0] if facts(models[0], n).is_floating_point()})
    free = {k: torch.zeros(len(models), requires_grad=True) for k in keys}
    beta = torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW([*free.values(), beta], lr=lr, weight_decay=0.0)
    for x, y in list(batches) * epochs:
        alpha = {k: f.detach().softmax(0) for k, f in free.items()}
        optimizer.zero_grad()
        grads = weight_gradients(
            model, models, lambda n, a=alpha: a[layer(n)].tolist(), x,
            lambda out, y=y: loss(beta * getattr(out, "logits", out), y), layer)
        for k, f in free.items():
            f.softmax(0).backward(grads[k])
        optimizer.step()
        with torch.no_grad():
            beta.clamp_(min=1e-3)
    return {k: f.detach().softmax(0) for k, f in free.items()}, float(beta.detach())


@dataclass(frozen=True, kw_only=True)
class Soup(Method):
    """Model soups: the average of models tuned from one start, at the price of one model.

    uniform: ``theta = (1/k) sum theta_i``. greedy (the recommendation): by held-out score, best
    first, each model stays in the mean if the mean is no worse for it (>=), so the soup is never
    below the best single model on held-out data. learned: ``sum_i alpha_i theta_i``, alpha trained
    on held-out batches, see :func:`learned`.

    Trains nothing (learned: k + 1 numbers). Memory: one tensor at a time, read from files; the
    model that is scored or learned from, beside. Checkpoints must share base and head start;
    running statistics need measuring again; low-rank updates are averaged by stacking
    (``blocks.weight.factor_algebra.cat``), not factor by factor. ``burnish soup`` is its command.
    """

    paper = "Model soups (2022), arXiv:2203.05482"
    tier = "checked against an independent equation"

    kind: Literal["greedy", "uniform", "learned"] = setting("greedy",
                                                            "which models enter, and how")

    def rule(self, tasks: Sequence[Task]) -> Rule:
        if self.kind != "uniform":
            raise ConfigError(f"a {self.kind} soup is made of whole runs on held-out data, by "
                              "`burnish soup`; soup(kind='uniform') is a rule among others")
        return lambda taus, *_: taus.mean(0)

    def lifecycle(self, *models: Checkpoint, score: Callable[[Checkpoint], float] | None = None,
                  model: nn.Module | None = None, batches: Iterable[tuple[Any, Tensor]] = ()
                  ) -> dict[str, Tensor]:
        """The soup. greedy needs `score`, held-out quality of a checkpoint, higher is better;
        learned `model` and held-out `batches` of (input, labels)."""
        if self.kind == "greedy":
            if score is None:
                raise ConfigError("a greedy soup needs score=, the held-out quality of a "
                                  "checkpoint; or soup(kind='uniform')")
            chosen, _ = greedy(len(models), lambda some: score(
                dict(uniform([models[i] for i in some]))))
            return dict(uniform([models[i] for i in chosen]))
        if self.kind == "learned":
            if model is None:
                raise ConfigError("a learned soup needs model= and batches= of held-out data")
            alpha, _ = learned(model, models, batches)
            return dict(mixed(models, lambda name: alpha[""].tolist()))
        return dict(uniform(models))
