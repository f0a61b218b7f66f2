"""Edits of linears made of the two factors of a gradient, by a net that has learnt to turn them.

    dL/dW = sum_t d_t u_t^T                  u_t (in,) what a row of the edit reads, d_t (out,) the
                                             gradient of its output
    W' = W - alpha sum_t d~_t u~_t^T         (u~, d~) = net([u; d], each whitened)

No matrix of the size of W is made while a net learns or an edit stands beside W:
``y' = y - alpha (x u~^T) d~``. See ``methods/lifecycle/mend.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batches import call
from ...core.errors import CheckError, ConfigError, DataError
from ...core.site import Place
from ..state.taps import evaluating
from .adapting import asking
from .token_kl import token_kl

Factors = dict[str, tuple[Tensor, Tensor]]


class Turning(nn.Module):
    """The net of all matrices of one shape, and the statistics of what it reads.

    ``h <- h + relu(gamma * (U V h + b) + beta)`` twice; U, V (2, ., .) and b are shared, gamma and
    beta (2, matrices, in + out) each matrix's own. U = 0: the identity. Of relu the derivative at 0
    is taken as 1, else nothing would ever leave U = 0.
    """

    #: what Welford's sums are of; no parameters, and kept with them
    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, out: int, inp: int, matrices: int, bottleneck: int,
                 generator: torch.Generator, like: Tensor):
        super().__init__()
        d, self.inp = inp + out, inp

        def made(t: Tensor) -> nn.Parameter:
            return nn.Parameter(t.to(like.device, like.dtype))

        self.U = made(torch.zeros(2, d, bottleneck))
        self.V = made(torch.randn(2, bottleneck, d, generator=generator))
        self.b = made(torch.zeros(2, d))
        self.gamma = made(torch.ones(2, matrices, d))
        self.beta = made(torch.zeros(2, matrices, d))
        for name, size in (("mean", (d,)), ("squares", (d,))):
            self.register_buffer(name, torch.zeros(size).to(like.device, torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def see(self, u: Tensor, d: Tensor) -> None:
        """Rows (T, in) and (T, out) enter the statistics."""
        rows = torch.cat([u, d], -1).to(self.mean.dtype)
        if not len(rows):
            return
        before, mean = int(self.count), rows.mean(0)
        share = len(rows) / (before + len(rows))
        away = mean - self.mean
        self.squares += (rows - mean).square().sum(0) + away.square() * before * share
        self.mean += away * share
        self.count += len(rows)

    def whitened(self, u: Tensor, d: Tensor) -> Tensor:
        """(T, in + out), less the mean and over the deviation of what was seen."""
        if int(self.count) < 2:
            raise DataError("an editor knows no deviation of gradients before it has seen two rows "
                            "of edits for matrices of each shape: let it learn first, of more "
                            "lessons at a time")
        deviation = (self.squares / (self.count.to(self.squares.device) - 1)).sqrt()
        z = torch.cat([u, d], -1)
        return (z - self.mean.to(z)) / (deviation.to(z) + 1e-7)

    def forward(self, u: Tensor, d: Tensor, matrix: int) -> tuple[Tensor, Tensor]:
        h = self.whitened(u, d)
        for k in range(2):
            a = h @ self.V[k].T @ self.U[k].T + self.b[k]
            h = h + (self.gamma[k, matrix] * a + self.beta[k, matrix]).clamp(min=0)
        return h[..., :self.inp], h[..., self.inp:]


@dataclass(frozen=True)
class Edit:
    """A change of some matrices. changes: name -> (left (T, out), right (T, in)) of
    ``dW = left^T right``, alpha and its sign in `left`."""

    model: nn.Module
    places: Mapping[str, Place]
    changes: Factors

    def dense(self, name: str) -> Tensor:
        """dW (out, in)."""
        left, right = self.changes[name]
        return left.T @ right

    @contextmanager
    def standing(self) -> Iterator[nn.Module]:
        """Inside, the model answers as edited; no weight is touched."""
        with ExitStack() as stack:
            for name, (left, right) in self.changes.items():
                def hook(module: Any, args: tuple, kw: dict[str, Any], y: Tensor,
                         left: Tensor = left, right: Tensor = right) -> Tensor:
                    x = args[0] if args else next(iter(kw.values()))
                    return y + ((x.to(right.dtype) @ right.T) @ left).to(y.dtype)

                module = self.model.get_submodule(self.places[name].path)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield self.model

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The model with ``W + dW``, for good."""
        for name in self.changes:
            place, change = self.places[name], self.dense(name)
            w = place.view(place.stored(self.model.get_submodule(place.path)).data)
            w.copy_(w.to(change.dtype) + change)
        return self.model


@dataclass(frozen=True)
class Lesson:
    """What an editor learns of. edit: a batch with what the model is to answer; rephrased: batches
    that the edit has to be right on too; local: inputs it may not change."""

    edit: Any
    rephrased: Any
    local: Any

    @classmethod
    def of(cls, given: Any) -> Lesson:
        if isinstance(given, Lesson):
            return given
        if not isinstance(given, tuple | list) or len(given) != 3:
            raise DataError("a lesson of an editor is (edit, rephrased, local), three batches")
        return cls(*given)


class Editor:
    """A model and the nets that edit it: ``editor(batch)`` is the :class:`Edit` of a batch.

    loss: of (outputs, batch).  logits: of outputs.  counts: (batch, rows) -> mask of the rows of
    logits that count in the divergence, None for all."""

    def __init__(self, model: nn.Module, places: Sequence[Place], bottleneck: int, scale: float,
                 seed: int, loss: Callable[[Any, Any], Tensor], logits: Callable[[Any], Tensor],
                 counts: Callable[[Any, torch.Size], Tensor | None]):
        self.model, self.places = model, {p.name: p for p in places}
        self.loss, self.logits, self.counts = loss, logits, counts
        shapes: dict[tuple[int, int], list[str]] = {}
        for p in places:
            shapes.setdefault((p.out, p.inp), []).append(p.name)
        self.which = {n: (f"{out}x{inp}", i) for (out, inp), own in shapes.items()
                      for i, n in enumerate(own)}
        draw, first = torch.Generator().manual_seed(seed), places[0]
        like = first.stored(model.get_submodule(first.path))
        like = torch.empty(0, device=like.device,
                           dtype=torch.promote_types(like.dtype, torch.float32))
        self.nets = nn.ModuleDict({f"{out}x{inp}": Turning(out, inp, len(own), bottleneck, draw,
                                                           like)
                                   for (out, inp), own in shapes.items()})
        self.alpha = nn.ParameterDict({n.replace(".", "/"): nn.Parameter(like.new_tensor(scale))
                                       for n in self.places})

    def factors(self, batch: Any) -> Factors:
        """name -> (u (T, in), d (T, out)) of the loss on a batch, rows without either left out."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in self.places}
        with ExitStack() as stack:
            stack.enter_context(self._frozen())
            stack.enter_context(torch.enable_grad())
            for name, place in self.places.items():
                def hook(module: Any, args: tuple, kw: dict[str, Any], y: Tensor,
                         name: str = name) -> Tensor:
                    probe = torch.zeros_like(y, requires_grad=True)
                    x = args[0] if args else next(iter(kw.values()))
                    seen[name].append((x.detach(), probe))
                    return y + probe

                module = self.model.get_submodule(place.path)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            value = self.loss(call(self.model, batch), batch)
            if idle := [n for n, some in seen.items() if not some]:
                raise ConfigError(f"{idle[0]} is read past its module, so no edit can stand there; "
                                  "name others by targets")
            probes = [p for some in seen.values() for _, p in some]
            found = iter(torch.autograd.grad(value, probes, allow_unused=True))
        wide, out = next(iter(self.alpha.values())).dtype, {}
        for name, some in seen.items():
            each = [(x, torch.zeros_like(p) if (g := next(found)) is None else g) for x, p in some]
            u, d = (torch.cat([t.reshape(-1, t.shape[-1]).to(wide) for t in part])
                    for part in zip(*each, strict=True))
            if not bool(d.isfinite().all()):
                raise CheckError(f"the gradient of this edit at {name} is not finite")
            told = u.any(-1) & d.any(-1)
            out[name] = u[told], d[told]
        return out

    def __call__(self, batch: Any) -> Edit:
        """The edit that is to make the model answer a batch (inputs with labels, or what `loss`
        reads) as it says."""
        with torch.no_grad():
            return self.turned(self.factors(batch))

    def turned(self, factors: Factors) -> Edit:
        """The edit of these factors; follows the nets and alpha."""
        changes = {}
        for name, (u, d) in factors.items():
            shape, matrix = self.which[name]
            right, left = self.nets[shape](u, d, matrix)
            changes[name] = -self.alpha[name.replace(".", "/")] * left, right
        return Edit(self.model, self.places, changes)

    def see(self, factors: Factors) -> None:
        for name, (u, d) in factors.items():
            self.nets[self.which[name][0]].see(u, d)                      # type: ignore[operator]

    def learn(self, lessons: Iterable[Any], at_once: int, weight: float, rates: tuple[float, float],
              max_norm: float) -> int:
        """Steps of Adam on the nets and on alpha (a rate for each), a step for so many lessons,
        until they end; how many steps."""
        parts = [list(m.parameters()) for m in (self.nets, self.alpha)]
        adam = torch.optim.Adam([{"params": p, "lr": r} for p, r in zip(parts, rates, strict=True)])
        given, steps = iter(lessons), 0
        while some := [Lesson.of(x) for x in itertools.islice(given, at_once)]:
            found = [self.factors(x.edit) for x in some]
            for factors in found:
                self.see(factors)
            adam.zero_grad()
            with torch.enable_grad():
                for lesson, factors in zip(some, found, strict=True):
                    right, moved = self.terms(lesson, factors)
                    ((weight * right + moved) / len(some)).backward()
            if not bool(nn.utils.clip_grad_norm_([*parts[0], *parts[1]], max_norm).isfinite()):
                raise CheckError("a gradient of the lessons is not finite")
            adam.step()
            steps += 1
        return steps

    def terms(self, lesson: Lesson, factors: Factors) -> tuple[Tensor, Tensor]:
        """(loss on `rephrased`, KL(before || edited) on `local`) of the edit of these factors."""
        edit = self.turned(factors)
        with self._frozen():
            with torch.no_grad():
                before = self.logits(call(self.model, lesson.local))
            with torch.enable_grad(), edit.standing():
                right = self.loss(call(self.model, lesson.rephrased), lesson.rephrased)
                after = self.logits(call(self.model, lesson.local))
        return right, token_kl(after, before, self.counts(lesson.local, after.shape[:-1]))

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        with evaluating([m for m in self.model.modules() if m.training]), asking(self.model, ()):
            yield
