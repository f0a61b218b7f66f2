"""Weights of a tuned model put back to those of the aligned one it was tuned from, a few at a time.

See ``methods/lifecycle/recovery.py`` for what is done and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.errors import CheckError, ConfigError
from ..choose.above import threshold
from ..state.early import last_token
from ..update.adapting import asking
from ..update.rules import accumulator

Score = Callable[[nn.Module], float]
Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Restored:
    """Which weights are the aligned model's again: `index`, flat positions by name, rising.

    step: after which it was chosen, 0 for the tuned model itself. rollback: whether each step gave
    some back. score, harm: as they stand; trace: (step, share restored, score, harm) of every step
    that was looked at, the tuned model first.
    """

    index: dict[str, Tensor]
    step: int
    rollback: bool
    share: float
    score: float
    harm: float
    trace: list[tuple[int, float, float, float]] = field(default_factory=list)


class Restoring:
    """A tuned model on its way: share of all parameters a step, `layers` blocks, `back` the share
    that a rollback gives back."""

    def __init__(self, model: nn.Module, aligned: Mapping[str, Tensor], harmful: Batches,
                 task: Batches, *, share: float, layers: int | None, back: float):
        if not harmful or not task:
            raise ConfigError("recovery needs batches of harmful prompts, and of the task's own")
        anatomy = Anatomy.of(model)
        every = layers or max(1, len(anatomy.blocks) // 2)
        if not 1 <= every <= len(anatomy.blocks) or len({b.stack for b in anatomy.blocks}) > 1:
            raise ConfigError(f"recovery reads block {every} of one run of blocks, and this model "
                              f"has {len(anatomy.blocks)} in "
                              f"{len({b.stack for b in anatomy.blocks})}")
        blocks, norms = anatomy.blocks[:every], tuple(f"{n}." for n in anatomy.norms)
        self.path, below = blocks[-1].path, tuple(f"{b.path}." for b in blocks)
        self.share, self.give, self.model = share, back, model
        self.harmful, self.task = harmful, task
        self.params = {n: p for n, p in model.named_parameters()
                       if n.startswith(below) and not n.startswith(norms)}
        for name, p in model.named_parameters():
            there = aligned[name] if name in aligned else None
            if there is None or there.shape != p.shape or there.dtype != p.dtype:
                raise ConfigError(f"recovery: the aligned model has another {name}: " + (
                    "none" if there is None else f"{list(there.shape)} of {there.dtype}, not "
                    f"{list(p.shape)} of {p.dtype}"))
        self.aligned = aligned
        self.most = sum(p.numel() for p in model.parameters())
        if int(share * self.most) < 1:
            raise ConfigError(f"recovery: restored={share:g} is less than one of {self.most} "
                              "parameters")
        if all(torch.equal(p, aligned[n].to(p.device)) for n, p in self.params.items()):
            raise ConfigError(f"recovery: the first {every} blocks are the aligned model's: there "
                              "is nothing to put back")
        self.tuned = {n: p.detach().clone() for n, p in self.params.items()}
        self.back = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.params.items()}

    # -- the loop --------------------------------------------------------------------------------
    def choose(self, score: Score, harm: Score, *, steps: int, warmup: int, every: int,
               drop: float) -> Restored:
        with self._at_aligned():
            d_h = self._mean(self.harmful)
        d_b = self._mean(self.task)
        whole = self._figure("score", score)
        least = whole - drop * abs(whole)
        first = (0, 0.0, whole, self._figure("harm", harm))
        for rollback in (False, True):
            self.tuned_again()
            kept, trace, g = [({}, first)], [first], {}
            for step in range(1, steps + 1):
                g = self._gradients(self.harmful, d_h, {} if rollback else g)
                just = self._towards(self.aligned, g, int(self.share * self.most))
                if rollback:
                    g = self._gradients(self.task, d_b, {})
                    self._towards(self.tuned, g, None, just)
                if not rollback and step == warmup and self._figure("score", score) < least:
                    break
                if step % every == 0:
                    trace.append((step, self._share(), self._figure("score", score),
                                  self._figure("harm", harm)))
                    kept.append((self._index(), trace[-1]))
            else:
                index, best = min((k for k in kept if k[1][2] >= least),
                                  key=lambda k: (k[1][3], -k[1][2]))
                return Restored(index, best[0], rollback, *best[1:], trace)
        raise AssertionError

    def _figure(self, what: str, of: Score) -> float:
        value: Any = of(self.model)
        try:
            found = float(value)
        except (TypeError, ValueError, RuntimeError):
            found = math.nan
        if not math.isfinite(found):
            raise CheckError(f"recovery: {what} gave {value!r}, and models are compared by finite "
                             "numbers")
        return found

    # -- one step --------------------------------------------------------------------------------
    def _gradients(self, batches: Batches, direction: Tensor, total: dict[str, Tensor]
                   ) -> dict[str, Tensor]:
        """Of ``- sum cos``, on top of `total`."""
        for batch in batches:
            with torch.enable_grad(), asking(self.model, self.params.values()):
                h = last_token(self.model, self.path, batch).mean(0).to(direction.dtype)
                found = torch.autograd.grad(-F.cosine_similarity(h, direction, dim=0),
                                            list(self.params.values()), allow_unused=True)
            for name, new in zip(self.params, found, strict=True):
                if new is None:
                    continue
                if not bool(new.isfinite().all()):
                    raise CheckError(f"recovery: the gradient of {name} is not finite")
                new = new.to(accumulator(new.dtype))
                total[name] = total[name] + new if name in total else new
        return total

    @torch.no_grad()
    def _towards(self, goal: Mapping[str, Tensor], g: Mapping[str, Tensor], k: int | None,
                 among: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Entries, of those `among`, that become the goal's: the k with the largest |g| where
        descent goes there (None: the share `back` of these)."""
        def may(name: str) -> Tensor:
            p = self.params[name]
            same = (p - goal[name].to(p)).sign() * g[name].sign() > 0
            return same if among is None else same & among[name]

        def sizes() -> Iterator[Tensor]:
            return (g[n][may(n)].abs() for n in g)

        if k is None:
            k = int(self.give * sum(s.numel() for s in sizes()) + 1e-9)
        cut, out = threshold(sizes, k) if k else torch.inf, {}
        for name in g:
            chosen = may(name) & (g[name].abs() > cut)
            p = self.params[name]
            p.copy_(torch.where(chosen, goal[name].to(p), p))
            self.back[name] = self.back[name] | chosen if among is None else \
                self.back[name] & ~chosen
            out[name] = chosen
        return out

    # -- where it stands ---------------------------------------------------------------------------
    @torch.no_grad()
    def _mean(self, batches: Batches) -> Tensor:
        """(D,): the mean of h over all prompts."""
        found = torch.cat([last_token(self.model, self.path, b) for b in batches])
        return found.to(accumulator(found.dtype)).mean(0)

    @contextmanager
    def _at_aligned(self) -> Iterator[None]:
        was = {n: p.data for n, p in self.model.named_parameters()}
        try:
            for n, p in self.model.named_parameters():
                p.data = self.aligned[n].to(p.device)
            yield
        finally:
            for n, p in self.model.named_parameters():
                p.data = was[n]

    @torch.no_grad()
    def tuned_again(self) -> None:
        for n, p in self.params.items():
            p.copy_(self.tuned[n])
            self.back[n].zero_()

    @torch.no_grad()
    def stand(self, index: Mapping[str, Tensor]) -> None:
        self.tuned_again()
        for n, at in index.items():
            p = self.params[n]
            flat = p.reshape(-1).clone()
            flat[at] = self.aligned[n].to(p).reshape(-1)[at]
            p.copy_(flat.view_as(p))

    def _index(self) -> dict[str, Tensor]:
        return {n: b.flatten().nonzero().squeeze(1) for n, b in self.back.items() if b.any()}

    def _share(self) -> float:
        return sum(int(b.sum()) for b in self.back.values()) / self.most
