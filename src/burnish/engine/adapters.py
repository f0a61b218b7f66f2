"""Several recipes on one model: each adapter's own base weights, and an add that was refused.

An adapter is what was added to the model plus the base weights it trains (a head, biases). Only
one set of values can stand in the model; those of the other adapters wait beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.recipe import Recipe
from .slot import Slot, slots
from .swap import unprovide, unswap

if TYPE_CHECKING:
    from .tuned import Tuned


@dataclass
class Adapter:
    """One named recipe on the model: what it was made of and what of the base it trains.

    selected: base parameters it trains, by name; decay: False for those no decay applies to.
    away: their values while another adapter's stand in the model.
    settled: part -> place -> what it decided from data, so that a file needs none.
    """

    name: str
    recipe: Recipe
    targets: Any
    head: bool
    seed: int
    originals: Any
    selected: dict[str, nn.Parameter] = field(default_factory=dict)
    decay: dict[str, bool] = field(default_factory=dict)
    away: dict[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)
    settled: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def select(self, name: str, parameter: nn.Parameter, decay: bool = True) -> None:
        self.selected[name] = parameter
        self.decay[name] = decay and self.decay.get(name, True)

    def values(self) -> dict[str, Tensor]:
        """Its base weights as it has trained them, wherever they are."""
        if self.away is not None:
            return self.away
        return {n: p.detach() for n, p in self.selected.items()}


def check_name(name: str, taken: dict[str, Adapter]) -> None:
    """An adapter's name becomes part of tensor names: a plain word that nothing else uses."""
    reserved = name in vars(Slot(None, "")) or hasattr(Slot, name)
    if not name.isidentifier() or reserved or name.startswith("provided_"):
        raise ConfigError(f"adapter name {name!r}: expected a plain word (letters, digits, _) that "
                          "is no word of torch's or burnish's own")
    if name in taken:
        raise ConfigError(f"there is an adapter {name!r} already; names are {', '.join(taken)}")


def check_storage(recipe: Recipe, taken: dict[str, Adapter]) -> None:
    """All adapters stand on one base: only the first recipe says in what form it is held."""
    for part in recipe:
        if taken and "storage" in part.axes():
            raise ConfigError(f"{part.name} changes the form of the weights that "
                              f"{', '.join(taken)} stand on; name it in the recipe given to tune")


def check_rows(tuned: Tuned, names: set[str]) -> None:
    """Refuse adapters that cannot differ from sample to sample."""
    for name in sorted(names):
        if selected := tuned.adapters[name].selected:
            raise ConfigError(f"{name!r} trains {next(iter(selected))}, which every sample of a "
                              "batch shares; per-sample adapters hold additions only (head=False)")
        for (path, _), readers in tuned.state.readers.items():
            if name in readers:
                raise ConfigError(f"{name!r} reads states of {path} elsewhere; per-sample adapters "
                                  "read where they write")


@torch.no_grad()
def bring(tuned: Tuned, active: dict[str, float]) -> None:
    """Let the base weights that adapters train take the values of those in `active`: the
    adapter's own, or the start plus the weighted sum of what each has changed."""
    whole = next(iter(active)) if list(active.values()) == [1.0] else None
    if not any(a.selected for a in tuned.adapters.values()) \
            or whole is not None and tuned.adapters[whole].away is None:
        return                                   # nothing to move, or it stands there already
    for a in tuned.adapters.values():
        if a.away is None and a.name != whole:
            a.away = {n: p.detach().clone() for n, p in a.selected.items()}
    for key, p in {k: p for a in tuned.adapters.values() for k, p in a.selected.items()}.items():
        start = original(tuned, key).to(p.device)
        parts = [(w, tuned.adapters[n]) for n, w in active.items()
                 if key in tuned.adapters[n].selected]
        if whole is not None and parts:
            p.copy_(parts[0][1].values()[key])
        else:
            p.copy_(start + sum(w * (a.away[key] - start) for w, a in parts))
    if whole is not None:
        tuned.adapters[whole].away = None


def original(tuned: Tuned, key: str) -> Tensor:
    """A base weight as it was before anything trained it."""
    path, _, leaf = key.rpartition(".")
    return tuned.originals.get(path, leaf)


def file_names(tuned: Tuned, name: str) -> dict[str, str]:
    """Name of each selected weight of an adapter in files: the first adapter that trains a weight
    writes it under the weight's own name, later ones add theirs."""
    before: set[str] = set()
    for other in tuned.adapters.values():
        if other.name == name:
            break
        before |= set(other.selected)
    return {k: f"{k}@{name}" if k in before else k for k in tuned.adapters[name].selected}


class Before:
    """What an add may change, to be put back when it is refused."""

    def __init__(self, tuned: Tuned):
        tape = tuned.state.tape
        self.tape = (tape.lean, tape.policy, dict(tape.intercept))
        self.originals = set(tuned.originals)
        self.slots = {path: (slot.mode, set(slot.reads), list(slot.listeners), set(slot.providers))
                      for path, _, slot in slots(tuned.model)}

    def restore(self, tuned: Tuned, name: str) -> None:
        """Take everything of the adapter `name` out again."""
        tape = tuned.state.tape
        tape.lean, tape.policy, tape.intercept = self.tape
        for path, module, slot in slots(tuned.model):
            slot.drop(name)
            mode, reads, listeners, provided = self.slots.get(path, (None, set(), [], set()))
            for param in set(slot.providers) - provided:
                del slot._modules[slot.providers.pop(param)]
                unprovide(module, param, tuned.originals.get(path, param)
                          .to(tuned.originals.home(path, param)))
            slot.mode, slot.reads, slot.listeners = mode, reads, listeners
            if slot.idle:
                unswap(module)
        for key in set(tuned.originals) - self.originals:
            tuned.originals.forget(*key)
