from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.method import Method, setting

Checkpoint = Mapping[str, Tensor]
Score = Callable[[dict[str, Tensor]], float]


class Mean:
    """A running mean of checkpoints: a sum in fp32 and a count, one model of memory."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.count = 0

    def add(self, model: Checkpoint) -> Mean:
        self._check(model)
        for name in model:
            t = model[name]
            if not self.count:
                self.dtypes[name] = t.dtype
                self.total[name] = t.to(_wide(t), copy=True)
            elif t.is_floating_point():
                self.total[name].add_(t)
        self.count += 1
        return self

    def value(self, also: Checkpoint | None = None) -> dict[str, Tensor]:
        """The mean (with `also` in it), in the dtypes of the first; integers are the first's."""
        if also is not None:
            self._check(also)
        count = self.count + (also is not None)
        return {n: ((t if also is None else t + also[n]) / count
                    if t.is_floating_point() else t).to(self.dtypes[n])
                for n, t in self.total.items()}

    def _check(self, model: Checkpoint) -> None:
        if self.count and model.keys() != self.total.keys():
            odd = sorted(model.keys() ^ self.total.keys())[0]
            raise ConfigError(f"a soup needs checkpoints of one architecture; {odd} is not in all")
        for n, t in self.total.items():
            if model[n].shape != t.shape:
                raise ConfigError(f"a soup needs checkpoints of one architecture; {n} is "
                                  f"{list(model[n].shape)} beside {list(t.shape)}")


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else t.dtype


def uniform(models: Iterable[Checkpoint]) -> dict[str, Tensor]:
    """``(1/k) sum theta_i``, reading one checkpoint at a time."""
    mean = Mean()
    for m in models:
        mean.add(m)
    if not mean.count:
        raise ConfigError("a soup needs at least one checkpoint")
    return mean.value()


def greedy(models: Sequence[Checkpoint], score: Score,
           scores: Sequence[float] | None = None) -> tuple[dict[str, Tensor], list[int], float]:
    """(soup, which models are in it, its score): each model stays if the mean is no worse for it.

    Models are tried by held-out score, best first (`scores` where they are known already); the
    comparison is >=, so the soup is never below the best single model on the held-out data.
    """
    if not models:
        raise ConfigError("a soup needs at least one checkpoint")
    single = [float(score(dict(m))) for m in models] if scores is None else list(scores)
    if len(single) != len(models):
        raise ConfigError(f"greedy soup: {len(models)} checkpoints and {len(single)} scores")
    order = sorted(range(len(models)), key=lambda i: -single[i])
    mean, chosen, best = Mean().add(models[order[0]]), [order[0]], single[order[0]]
    for i in order[1:]:
        now = float(score(mean.value(also=models[i])))
        if now >= best:
            best = now
            mean.add(models[i])
            chosen.append(i)
    return mean.value(), chosen, best


# -- learned --------------------------------------------------------------------------------
def mixture(models: Sequence[Checkpoint], alphas: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """``sum_i alpha_i theta_i`` tensor by tensor; `alphas` gives the weights (k,) of a name."""
    out = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            out[name] = first
            continue
        a = alphas(name).tolist()
        total = first.to(_wide(first)) * a[0]
        for weight, m in zip(a[1:], models[1:], strict=True):
            total.add_(m[name], alpha=weight)
        out[name] = total.to(first.dtype)
    return out


def learned(model: nn.Module, models: Sequence[Checkpoint], batches: Iterable[tuple[Any, Tensor]],
            loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
            layer: Callable[[str], str] | None = None, epochs: int = 3, lr: float = 0.1,
            ) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """(soup, weights per layer, beta): weights and a logit scale trained on held-out batches.

    ``min_{alpha, beta} sum_j loss(beta f(x_j; sum_i alpha_i theta_i), y_j)``, alpha = softmax of
    free logits, one set for the model or one per ``layer(name)``. beta only scales logits while
    learning. Only one model and one gradient live at a time (:func:`alpha_gradient`).
    """
    layer = layer or (lambda name: "")
    keys = sorted({layer(n) for n, t in models[0].items() if t.is_floating_point()})
    free = {k: torch.zeros(len(models), requires_grad=True) for k in keys}
    beta = torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW([*free.values(), beta], lr=lr, weight_decay=0.0)
    held = list(batches)
    for _ in range(epochs):
        for x, y in held:
            with torch.no_grad():
                alpha = {k: f.softmax(0) for k, f in free.items()}
            da, db = alpha_gradient(model, models, lambda n, a=alpha: a[layer(n)], x, y, loss,
                                    float(beta.detach()), layer)
            optimizer.zero_grad()
            for k, f in free.items():
                f.softmax(0).backward(da[k])
            beta.grad = db
            optimizer.step()
            with torch.no_grad():
                beta.clamp_(min=1e-3)
    alpha = {k: f.detach().softmax(0) for k, f in free.items()}
    return mixture(models, lambda n: alpha[layer(n)]), alpha, float(beta.detach())


def alpha_gradient(model: nn.Module, models: Sequence[Checkpoint],
                   alphas: Callable[[str], Tensor], x: Any, y: Tensor,
                   loss: Callable[[Tensor, Tensor], Tensor], beta: float = 1.0,
                   layer: Callable[[str], str] = lambda name: "",
                   ) -> tuple[dict[str, Tensor], Tensor]:
    """(dL/dalpha per layer, dL/dbeta): ``dL/dalpha_i = <dL/dtheta, theta_i>``, tensor by tensor."""
    theta = mixture(models, alphas)
    names = [n for n, p in model.named_parameters() if n in theta and p.is_floating_point()]
    leaves = {n: theta[n].requires_grad_(True) for n in names}
    b = torch.tensor(beta, requires_grad=True)
    logits = torch.func.functional_call(model, theta, (x,))
    value = loss(b * logits, y)
    grads = torch.autograd.grad(value, [*leaves.values(), b], allow_unused=True)
    out = {layer(n): torch.zeros(len(models)) for n, t in theta.items() if t.is_floating_point()}
    for n, g in zip(names, grads, strict=False):
        if g is not None:
            flat = g.flatten().to(_wide(g))
            out[layer(n)] += torch.stack([flat @ m[n].flatten().to(flat) for m in models]).cpu()
    return out, grads[-1]


@dataclass(frozen=True, kw_only=True)
class Soup(Method):
    """Model soups: the average of models tuned from one start, at the price of one model.

    uniform: ``theta = (1/k) sum theta_i``. greedy (the recommendation): by held-out score, best
    first, each model stays in the mean if the mean is no worse for it (>=), so the soup is never
    below the best single model on held-out data. learned: see :func:`learned`.

    Trains nothing (learned: k + 1 numbers). Memory: one fp32 running sum whatever k. Checkpoints
    must share base and head start; running statistics need measuring again; low-rank updates are
    averaged by stacking (``blocks.weight.factor_algebra.cat``), not factor by factor.
    """

    paper = "Model soups (2022), arXiv:2203.05482"

    kind: Literal["greedy", "uniform"] = setting("greedy", "which models enter, and how")

    def lifecycle(self, *models: Checkpoint, score: Score | None = None) -> dict[str, Tensor]:
        """The soup. greedy needs `score`: held-out quality of a checkpoint, higher is better."""
        if self.kind == "uniform":
            return uniform(models)
        if score is None:
            raise ConfigError("a greedy soup needs score=, the held-out quality of a checkpoint; "
                              "or soup(kind='uniform')")
        return greedy(models, score)[0]
