"""Adapters of any method made into one by a rule: what each changes of the base, matrix by matrix.

An adapter's change of a matrix is made when it is read, so one matrix of each adapter is in memory
beside the model that is written; the bases of the adapters wait in their files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks import linalg
from ..blocks.weight.factor import Chain
from ..blocks.weight.taskvector import Changed, Reader, Rule, Task, pieces_of, planned
from ..blocks.weight.term import Term
from ..core.errors import ConfigError
from ..engine.updates import Update, updates

if TYPE_CHECKING:
    from ..engine.tuned import Tuned


class Adapted(Task):
    """What an adapter changes: its updates, in the order of the model, then what else it trains of
    the base (biases, norms). whole: a new head, which no base has."""

    def __init__(self, tuned: Tuned):
        self.tuned = tuned
        self.updates: dict[str, Update] = {u.name: u for u in updates(tuned)}
        self.shapes = {n: torch.Size(u.shape) for n, u in self.updates.items()}
        self.skipped, self.tied, self.whole = {}, {}, {}
        heads = tuple(f"{h}." for h in tuned.anatomy.head)
        for name, t in tuned.active.selected.items():
            path, _, leaf = name.rpartition(".")
            if name.startswith(heads) or (path, leaf) not in tuned.originals:
                self.whole[name] = t.detach()
                self.skipped[name] = "a head, averaged"
            elif name not in self.updates:
                self.shapes[name] = t.shape

    def reader(self, name: str) -> Reader:
        if name in self.updates:
            found = self.updates[name].delta()
        elif name in self.tuned.active.selected:
            path, _, leaf = name.rpartition(".")
            found = (self.tuned.active.selected[name].detach().cpu().double()
                     - self.tuned.originals.get(path, leaf).double())
        else:                                    # another adapter's place
            return lambda i, j: torch.zeros(j - i, dtype=torch.float64)
        flat = found.detach().reshape(-1).cpu()
        return lambda i, j: flat[i:j].double()

    def start(self, name: str) -> Reader:
        if name in self.updates:
            found = self.updates[name].base()
        elif name in self.tuned.active.selected:
            path, _, leaf = name.rpartition(".")
            found = self.tuned.originals.get(path, leaf)
        else:
            raise ConfigError(f"not all of the adapters change {name}, so it has no start here; "
                              "make whole models of them with `burnish merge`, and give those")
        flat = found.detach().reshape(-1).cpu()
        return lambda i, j: flat[i:j].double()


def tasks_of(tuned: Sequence[Tuned], names: Sequence[str], weights: Sequence[float]) -> list[Task]:
    """A stream for each adapter over all places that any of them changes (zero where it does not).

    Raises ConfigError for adapters that do nothing to weights, or something besides.
    """
    tasks = [Adapted(t) for t in tuned]
    every: dict[str, torch.Size] = {}
    for name, t in zip(names, tasks, strict=True):
        other = besides(t.tuned)
        if other is not None or not t.shapes:
            raise ConfigError(f"{name} is {t.tuned.recipe}, which " + (
                "changes no weight of the base: there is nothing to merge" if other is None else
                f"is more than a change of weights ({other}), so no rule can merge it"))
        for place, shape in t.shapes.items():
            if every.setdefault(place, shape) != shape:
                raise ConfigError(f"{name} was made on another base than {names[0]}: {place} is "
                                  f"{list(shape)}, not {list(every[place])}")
    for t in tasks:
        t.shapes = every
    return [t if w == 1 else scaled(t, w) for t, w in zip(tasks, weights, strict=True)]


def besides(tuned: Tuned) -> str | None:
    """A tensor of the adapter that is no part of any weight."""
    known = {id(p) for _, term in tuned.terms(Term) for p in term.parameters()}
    return next((n for n, p in tuned.named_parameters()
                 if id(p) not in known and n not in tuned.active.selected), None)


def scaled(task: Task, weight: float) -> Task:
    return Changed(task, lambda tau, *_: weight * tau)


@dataclass
class Made:
    """kind: "model" or "adapter".  whole: heads that were averaged.  error: of an adapter of a
    given rank, ``|Delta - B A| / |Delta|`` over all places; 0 for a model."""

    kind: str
    whole: list[str] = field(default_factory=list)
    error: float = 0.0


def merge_adapters(opened: Callable[[int], Tuned], target: Callable[[], Tuned],
                   names: Sequence[str], parts: Sequence[Any], weights: Sequence[float], new: Path,
                   rank: int | None = None, run: dict[str, Any] | None = None) -> Made:
    """``theta_0 + rule(Delta_1 ... Delta_T)`` as a model folder in `new`, or with a `rank` the best
    LoRA adapter of that rank.

    opened(i): adapter i on a base of its own, which may wait in its files. target(): the first one
    on a base that is in memory. run: the facts of an adapter's run, to be written with it.
    """
    tuned = [opened(i) for i in range(len(names))]
    tasks, rule = planned(parts, tasks_of(tuned, names, weights))
    places = {u.name: u.place for t in tuned for u in updates(t)}
    heads = _averaged([Adapted(t).whole for t in tuned], names)
    like = target()
    active = like.active
    model = like.detach()
    made = Made("model" if rank is None else "adapter", sorted(heads))
    changes = _changes(tasks, rule)
    if rank is None:
        for name, change in changes:
            add_to(model, name, places.get(name), change)
        for name, t in heads.items():
            _put(model.get_parameter(name), t)
        model.save_pretrained(new)
        return made
    if odd := [n for n in tasks[0].shapes if places.get(n) is None]:
        raise ConfigError(f"{odd[0]} trains whole, and an adapter of factors has no place for it; "
                          "leave out --rank to write a whole model")
    import burnish

    lora = burnish.tune(model, f"lora(rank={rank}, alpha={rank})", targets=list(places),
                        head=active.head, seed=active.seed)
    terms = dict(lora.terms(Chain))
    lost = total = 0.0
    for name, change in changes:
        A, B = factored(change, rank, terms[name].scale)
        total += float(change.square().sum())
        lost += float((change - terms[name].scale * B @ A).square().sum())
        _put(terms[name].A, A), _put(terms[name].B, B)
    for name, t in heads.items():
        _put(model.get_parameter(name), t)
    made.error = (lost / max(total, 1e-30)) ** 0.5
    lora.save(new, run=None if run is None else {**run, "recipe": str(lora.recipe),
                                                 "made_of": list(names)})
    return made


def factored(change: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) of the best ``scale B A`` of a rank, singular values shared by both."""
    U, S, Vh = torch.linalg.svd(change, full_matrices=False) if change.dim() > 2 else \
        linalg.svd(change, rank)
    root = (S[..., :rank] / scale).sqrt()
    return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)


def _changes(tasks: Sequence[Task], rule: Rule) -> Iterator[tuple[str, Tensor]]:
    for name, shape in tasks[0].shapes.items():
        out = torch.empty(shape.numel(), dtype=torch.float64)
        for i, rows in pieces_of(tasks, name):
            out[i:i + rows.shape[1]] = rule(rows, name, i)
        yield name, out.view(shape)


def _averaged(heads: Sequence[dict[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """The means of heads, which have no base to be a change of."""
    for name, head in zip(names[1:], heads[1:], strict=True):
        if {n: t.shape for n, t in head.items()} != {n: t.shape for n, t in heads[0].items()}:
            raise ConfigError(f"the head of {name} is another than that of {names[0]}, so they "
                              "have no mean; merge adapters of one task's head, or without heads")
    return {n: torch.stack([h[n].double().cpu() for h in heads]).mean(0) for n in heads[0]}


@torch.no_grad()
def add_to(model: nn.Module, name: str, place: Any, change: Tensor) -> None:
    """Add a change (in fp64, on the host) to a place's weight, or to the parameter of a name."""
    if place is None:
        p = model.get_parameter(name)
        _put(p, p.detach().cpu().double() + change.view(p.shape))
        return
    p = place.stored(model.get_submodule(place.path))
    view = place.view(p.detach())
    summed = (view.cpu().double() + change).to(p.dtype)
    if place.rows:
        view.copy_(summed)
    else:
        p.copy_(place.unview(summed, p))


@torch.no_grad()
def _put(p: Tensor, value: Tensor) -> None:
    p.copy_(value.to(p.dtype))
