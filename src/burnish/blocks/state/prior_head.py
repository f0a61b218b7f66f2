"""A linear head whose parameters follow the shares of its classes.

    (dW, db, gamma, beta) = g(pi) = W2 relu(W1 pi + b1) + b2
    z(h, pi) = head(h') + dW h' + db + tau log pi,          h' = (1 + gamma) h + beta

h (B, D) are features, pi (K,) the share of each class; g is an MLP, and W2 = b2 = 0 at the start,
so with pi uniform z is what the head says, and a constant that no answer sees. The head itself is
called, whatever stands at it, and none of its parameters moves.

:meth:`PriorHead.learn` draws, for every update, shares from :func:`shares`, then samples as they
say (a class by its share, a row of that class), and goes down the cross-entropy of z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import CheckError, ConfigError
from ..update.rules import accumulator

KINDS = ("long-tailed", "uniform", "inverse")


def shares(kind: str, first: Tensor, imbalance: float) -> Tensor:
    """(K,) pi, in float64: the share falls from the first of the classes to the last by
    `imbalance`, evenly in its logarithm. first: the classes in that order; "inverse": from behind.
    """
    n = len(first)
    fall = torch.arange(n, dtype=torch.float64, device=first.device) / max(n - 1, 1)
    weight = torch.ones_like(fall) if kind == "uniform" else \
        imbalance ** -(fall if kind == "long-tailed" else 1 - fall)
    return torch.empty_like(weight).scatter_(0, first, weight / weight.sum())


class PriorHead:
    """See the module. Its g is drawn when made; `decay` is of the shares that a stream keeps.

    As a part of an ``Adapting`` (blocks/update/adapting.py) it answers in the head's place: of a
    batch it first says z under the shares so far, moves these to
    ``decay pi + (1 - decay) mean_i softmax(z_i)``, and then answers under them. A known `prior`
    stays what it is.
    """

    def __init__(self, who: str, head: nn.Module, features: Tensor, classes: int, hidden: int,
                 tau: float, decay: float, prior: Tensor | None = None):
        dtype, width = accumulator(features.dtype), features.shape[1]
        self.who, self.head, self.tau, self.decay = who, head, tau, decay
        self.classes, self.width = classes, width
        like: dict[str, Any] = {"dtype": dtype, "device": features.device}
        self.g = {"w1": torch.empty(hidden, classes, **like).uniform_(-1, 1) / math.sqrt(classes),
                  "b1": torch.empty(hidden, **like).uniform_(-1, 1) / math.sqrt(classes),
                  "w2": torch.zeros(classes * width + classes + 2 * width, hidden, **like),
                  "b2": torch.zeros(classes * width + classes + 2 * width, **like)}
        self.known = None if prior is None else prior.to(**like)
        self._inside = False
        self.begin()

    # -- the head ---------------------------------------------------------------------------------
    def made(self, prior: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g(pi): (dW (K, D), db (K,), gamma (D,), beta (D,))."""
        flat = F.linear(F.relu(F.linear(prior, self.g["w1"], self.g["b1"])),
                        self.g["w2"], self.g["b2"])
        dW, db, gamma, beta = flat.split([self.classes * self.width, self.classes, self.width,
                                          self.width])
        return dW.view(self.classes, self.width), db, gamma, beta

    def logits(self, h: Tensor, prior: Tensor) -> Tensor:
        """z, (B, K), in the precision of g."""
        dW, db, gamma, beta = self.made(prior)
        wide = (1 + gamma) * h.to(dW.dtype) + beta
        self._inside = True
        try:
            said = self.head(wide.to(h.dtype)).to(dW.dtype)
        finally:
            self._inside = False
        return said + F.linear(wide, dW, db) + self.tau * prior.clamp_min(
            torch.finfo(prior.dtype).tiny).log()

    def learn(self, h: Tensor, labels: Tensor, *, updates: int, rows: int, rate: float,
              imbalance: float, drawn_order: bool) -> list[float]:
        """Adam on g alone, by source features and their labels; the loss of each update."""
        counts = labels.bincount(minlength=self.classes)
        if int((counts == 0).sum()):
            raise ConfigError(f"{self.who}: the source data have no row of class "
                              f"{int((counts == 0).nonzero()[0])}, and learning draws rows of "
                              "every class")
        index, starts = labels.argsort(stable=True), counts.cumsum(0) - counts
        order = counts.argsort(descending=True, stable=True)
        params = [p.requires_grad_() for p in self.g.values()]
        optimizer, losses = torch.optim.Adam(params, rate), []
        try:
            for _ in range(updates):
                if drawn_order:
                    order = torch.randperm(self.classes, device=h.device)
                kind = KINDS[int(torch.randint(len(KINDS), ()))]
                prior = shares(kind, order, imbalance)
                y = torch.multinomial(prior, rows, replacement=True)
                at = (torch.rand(rows, dtype=torch.float64, device=h.device) * counts[y]).long()
                with torch.enable_grad():
                    loss = F.cross_entropy(self.logits(h[index[starts[y] + at]],
                                                       prior.to(params[0].dtype)), y)
                    grads = torch.autograd.grad(loss, params)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise CheckError(f"{self.who}: the loss on source data is not finite")
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                optimizer.step()
        finally:
            for name, p in self.g.items():
                self.g[name] = p.detach()
        return losses

    # -- a part of what adapts --------------------------------------------------------------------
    def begin(self) -> None:
        """A stream's start: the known shares, or as many of each class."""
        uniform = torch.full_like(self.g["w1"][0], 1 / self.classes)
        self.prior = uniform if self.known is None else self.known.clone()

    def state(self) -> dict[str, Tensor]:
        return {"prior": self.prior.clone()} | {k: v.clone() for k, v in self.g.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.prior.copy_(state["prior"])
        for name, tensor in self.g.items():
            tensor.copy_(state[name])

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Inside, the head answers as above. Of several forwards of a batch the last counts, of a
        batch that was refused none."""
        before = self.prior
        hook = self.head.register_forward_hook(self._answer(before), with_kwargs=True)
        try:
            yield
        except BaseException:
            self.prior = before
            raise
        finally:
            hook.remove()

    def _answer(self, before: Tensor) -> Any:
        def answer(head: Any, args: tuple, kw: dict[str, Any], out: Any) -> Tensor | None:
            if self._inside:
                return None
            h = args[0] if args else next(iter(kw.values()))
            if h.dim() != 2:
                raise ConfigError(f"{self.who}: a row of features is expected for each sample, "
                                  f"and the head reads {list(h.shape)}")
            if self.known is None:
                with torch.no_grad():
                    seen = self.logits(h, before).softmax(-1).mean(0)
                if not bool(seen.isfinite().all()):
                    raise CheckError(f"{self.who}: the answers to this batch are not finite; "
                                     "nothing was moved")
                self.prior = self.decay * before + (1 - self.decay) * seen
            return self.logits(h, self.prior).to(out.dtype)
        return answer
