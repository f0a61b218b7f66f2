"""Several recipes on one model: each adapter's own base weights and running statistics.

An adapter is what was added to the model, the base weights it trains (a head, biases) and the
buffers its training has moved. Only one set of values can stand in the model; those of the other
adapters wait beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocks.update.step import compose
from ..core.batches import call
from ..core.call import Call, by_rows
from ..core.draw import drawn
from ..core.errors import ConfigError, nearest
from ..core.recipe import Recipe
from .attach import Attacher
from .entries import switch
from .leave import take_out
from .observe import Batches
from .planned import make_plan
from .slot import Slot, settle, slots
from .spread import let_go, refuse
from .swap import ATTR, PROVIDED, provider_of

if TYPE_CHECKING:
    from .tuned import Tuned


@dataclass
class Adapter:
    """One named recipe on the model: what it was made of and what of the base it trains.

    selected: base parameters it trains, by name; decay: False for those no decay applies to.
    away: their values, and those of the buffers it has moved, while another adapter's stand in
    the model.
    parts: (path of the module, key) of everything that was added.
    filled: its values come from a file, so nothing is read or decomposed for them.
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
    parts: list[tuple[str, str]] = field(default_factory=list)
    filled: bool = False

    def select(self, name: str, parameter: nn.Parameter, decay: bool = True) -> None:
        self.selected[name] = parameter
        self.decay[name] = decay and self.decay.get(name, True)

    def values(self) -> dict[str, Tensor]:
        """Its base weights as it has trained them, wherever they are."""
        if self.away is not None:
            return {n: self.away[n] for n in self.selected}
        return {n: p.detach() for n, p in self.selected.items()}


def check_name(name: str, taken: dict[str, Adapter]) -> None:
    """An adapter's name becomes part of tensor names: a plain word that nothing else uses."""
    reserved = name in vars(Slot(None, "")) or hasattr(Slot, name)
    if not name.isidentifier() or reserved or name.startswith(PROVIDED):
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


def check_kept(recipe: Recipe, taken: dict[str, Adapter]) -> None:
    """What backward keeps is asked of the whole model, whichever adapter is in use: a part that
    says so may come again, but not with other settings."""
    said = {resource: (name, part) for name, adapter in taken.items() for part in adapter.recipe
            if "activations" in part.axes() for resource in part.claims()}
    for part in recipe:
        for resource in part.claims() if "activations" in part.axes() else ():
            name, there = said.get(resource, ("", part))
            if there != part:
                raise ConfigError(f"{part} asks for {resource}, which {name!r} has asked for with "
                                  f"{there}; it is one for all adapters of a model: leave it out, "
                                  "or say the same")


def check_rows(tuned: Tuned, rows: tuple[str | None, ...]) -> None:
    """Refuse adapters that cannot differ from sample to sample."""
    _ask_listeners(tuned, Call(rows=rows))
    for name in sorted({n for n in rows if n is not None}):
        if selected := tuned.adapters[name].selected:
            raise ConfigError(f"{name!r} trains {next(iter(selected))}, which every sample of a "
                              "batch shares; per-sample adapters hold additions only (head=False)")
        if moved := moved_buffers(tuned, name):
            raise ConfigError(f"{name!r} has moved {next(iter(moved))}, which every sample of a "
                              "batch shares; per-sample adapters leave running statistics alone "
                              "(train them with those modules in evaluation mode)")
        for (path, _), readers in tuned.state.readers.items():
            if any(part.adapter == name for part in readers):
                raise ConfigError(f"{name!r} reads states of {path} elsewhere; per-sample adapters "
                                  "read where they write")


def check_mix(tuned: Tuned, weights: dict[str, float]) -> None:
    """Running statistics mix between the base's and the adapters', never beyond: a variance
    outside may be negative. A function of W is used whole, and one at a time."""
    for _, module, slot in slots(tuned.model):
        make_plan(slot, module, tuple(weights.items()))
    _ask_listeners(tuned, Call(active=tuple(weights.items())))
    inside = all(w >= 0 for w in weights.values()) and sum(weights.values()) <= 1 + 1e-6
    for name in () if inside else weights:
        if moved := moved_buffers(tuned, name):
            raise ConfigError(f"{name!r} has moved {next(iter(moved))}; running statistics mix "
                              "with weights that are not negative and add up to 1 at most, "
                              f"not {weights}")


def _ask_listeners(tuned: Tuned, call: Call) -> None:
    for _, _, slot in slots(tuned.model):
        for listener in slot.listeners:
            listener.check(call)


def check_train(tuned: Tuned, weights: dict[str, float], train: str) -> None:
    """One adapter of a mix may train if it is there whole and is an addition only."""
    if train not in weights:
        raise ConfigError(f"train={train!r} is not among those used: {', '.join(weights) or 'none'}"
                          f"{nearest(train, weights)}")
    if weights[train] != 1.0:
        raise ConfigError(f"{train!r} trains at weight 1, not {weights[train]}: scale the others")
    if selected := tuned.adapters[train].selected:
        raise ConfigError(f"{train!r} trains {next(iter(selected))} of the base, which the others "
                          "of the mix change too; what trains beside others is an addition "
                          "(head=False)")


def moved_buffers(tuned: Tuned, name: str) -> dict[str, Tensor]:
    """Buffers of the base that an adapter has moved, with its values, wherever they are."""
    adapter = tuned.adapters[name]
    if adapter.away is None:
        return tuned.buffers.moved()
    return {k: v for k, v in adapter.away.items() if k not in adapter.selected}


@torch.no_grad()
def bring(tuned: Tuned, active: dict[str, float]) -> None:
    """Let the base tensors that adapters train or move take the values of those in `active`: the
    adapter's own, or the start plus the weighted sum of what each has changed."""
    adapters = tuned.adapters
    whole = next(iter(active)) if list(active.values()) == [1.0] else None
    if whole is not None and adapters[whole].away is None:
        return                                   # it stands there already
    live = dict(tuned.buffers.live())
    for a in adapters.values():
        live.update(a.selected)
    leaving = next((a for a in adapters.values() if a.away is None), None)
    if leaving is not None:
        leaving.away = {n: live[n].detach().clone()
                        for n in (*leaving.selected, *tuned.buffers.moved())}
    mine = {n: w for n, w in active.items() if w}
    for key, p in live.items():
        start = original(tuned, key).to(p.device)
        parts = [(w, adapters[n].away[key]) for n, w in mine.items() if key in adapters[n].away]
        if whole is not None and parts:
            value = parts[0][1]
        elif p.is_floating_point():
            value = start + sum(w * (own.to(p.device) - start) for w, own in parts)
        else:
            value = start                        # a counter has no weighted sum
        if not isinstance(p, nn.Parameter):
            tuned.buffers.stand(key, value)
            continue
        waiting = None if leaving is None else partial(
            leaving.away.__getitem__, key) if key in leaving.away else partial(original, tuned, key)
        tuned.undo.keep(p, waiting)
        p.copy_(value)
    if whole is not None:
        adapters[whole].away = None


def original(tuned: Tuned, key: str) -> Tensor:
    """A base tensor as it was before anything trained it."""
    path, _, leaf = key.rpartition(".")
    return tuned.originals.get(path, leaf) if (path, leaf) in tuned.originals \
        else tuned.buffers.start(key)


def file_names(tuned: Tuned, name: str) -> dict[str, str]:
    """Name in files of each base tensor that an adapter trains or has moved. The first adapter
    that trains a weight writes it under the weight's own name, later ones add theirs; so does
    every adapter but the first for buffers."""
    before: set[str] = set()
    for other in tuned.adapters.values():
        if other.name == name:
            break
        before |= set(other.selected)
    first = name == next(iter(tuned.adapters))
    return {**{k: f"{k}@{name}" if k in before else k for k in tuned.adapters[name].selected},
            **{k: k if first else f"{k}@{name}" for k, _ in tuned.buffers.live()}}


def still_there(tuned: Tuned) -> None:
    """What was added and what trains is in the model yet, under its name and in its shape.

    A parameter that was replaced by one of the same shape takes its place. Raises ConfigError.
    """
    let_go(tuned)
    advice = "call tuned.detach() before a model is changed, and tune it again"
    found = {}
    for adapter in tuned.adapters.values():
        for path, key in adapter.parts:
            if path not in found:
                found[path] = _slot(tuned.model, path)
            if found[path] is None or key not in found[path]._modules.get(adapter.name, ()):
                raise ConfigError(f"{path or 'the model'} was replaced since it was tuned, and "
                                  f"{adapter.name}.{key} went with it; {advice}")
        for name in adapter.selected:
            try:
                now = tuned.model.get_parameter(name)
            except AttributeError:
                raise ConfigError(f"{name}, which {adapter.name!r} trains, is gone from the "
                                  f"model; {advice}") from None
            path, _, leaf = name.rpartition(".")
            if now.shape != (was := tuned.originals.shape(path, leaf)):
                raise ConfigError(f"{name}, which {adapter.name!r} trains, was {tuple(was)} and "
                                  f"is {tuple(now.shape)} now; {advice}")
            adapter.selected[name] = now


def _slot(model: nn.Module, path: str) -> Slot | None:
    try:
        return model.get_submodule(path)._modules.get(ATTR)
    except AttributeError:
        return None


class Adapters(dict[str, Adapter]):
    """The adapters of a tuned model by name, and which of them are in use. A part of
    :class:`~burnish.engine.tuned.Tuned`, which says what each method does for a user and makes
    whole changes of them."""

    def __init__(self, tuned: Tuned):
        super().__init__()
        self.tuned = tuned

    @property
    def active(self) -> Adapter:
        """The one that trains; where none does, the first in use."""
        state = self.tuned.state
        names = [n for n, _ in state.active] or list(self)
        return self[state.training or names[0]]

    def known(self, name: str | None) -> Adapter:
        """The one of a name (None: the active one); ConfigError where there is none."""
        if name is None:
            return self.active
        if name not in self:
            raise ConfigError(f"no adapter {name!r}{nearest(name, self)} "
                              f"(there is {', '.join(self)})")
        return self[name]

    def add(self, name: str, recipe: Recipe, targets: Any, head: bool | str, seed: int,
            calibration: Iterable[Any] | None, settled: Mapping[str, Any] | None) -> None:
        """Join another recipe; in use if it is the first."""
        refuse(self.tuned, "another adapter")
        check_name(name, self)
        check_storage(recipe, self)
        check_kept(recipe, self)
        compose([m.optimizer() for m in recipe if "optimizer" in m.axes()],
                [("probe", nn.Parameter(torch.zeros(1)))], lr=0.0)         # its laws, refused now
        tuned, originals = self.tuned, self.tuned.originals
        train_head = bool(head) if head != "auto" else (
            tuned.anatomy.head_kind == "classification" and all(p.takes_head for p in recipe))
        adapter = Adapter(name, recipe, targets, train_head, seed, originals, filled=tuned.filled)
        adapter.settled = {part: dict(places) for part, places in (settled or {}).items()}
        batches = tuned.calibration if calibration is None else Batches(calibration)
        base = tuned.disabled if self else contextlib.nullcontext
        attacher = Attacher(tuned.model, tuned.anatomy, tuned.state, adapter, tuned.undo,
                            (batches, self._run, base))
        known = set(originals)
        tuned.undo.later(lambda: [originals.forget(*k) for k in set(originals) - known])
        with drawn(seed):
            attacher.attach(recipe)
        if train_head:
            self._train_head(adapter, attacher)
        adapter.notes = attacher.notes
        adapter.parts = [(path, part.key) for path, _, slot in slots(tuned.model)
                         for part in slot.parts if part.adapter == name]
        self[name] = adapter
        for key, p in adapter.selected.items():
            path, _, leaf = key.rpartition(".")
            originals.put(path, leaf, p)
        if len(self) == 1:
            tuned.use(name)
        else:                                    # it starts from the base's values, not another's
            adapter.away = {k: original(tuned, k).to(p.device, copy=True)
                            for k, p in adapter.selected.items()}
            self.set_trainable()

    def _run(self, batch: Any, loss: bool = False) -> Any:
        """One batch through the model, for a data pass."""
        return self.tuned.loss(batch) if loss else call(self.tuned.model, batch)

    def remove(self, name: str) -> None:
        """Take one out; where it was in use, the first of the others is."""
        self.known(name)
        refuse(self.tuned, "taking an adapter out")
        if len(self) == 1:
            raise ConfigError(f"{name!r} is the only adapter; tuned.detach() gives back the base")
        active = {n for n, _ in self.tuned.state.active} | set(self.tuned.state.rows or ())
        if name in active:
            self.tuned.use(next(n for n in self if n != name))
        take_out(self.tuned, name)
        self.set_trainable()
        self.tuned.steps.checked = False

    def _train_head(self, adapter: Adapter, attacher: Attacher) -> None:
        for path in self.tuned.anatomy.head:
            for leaf, p in self.tuned.model.get_submodule(path).named_parameters():
                if f".{ATTR}." not in f".{leaf}." and p.is_floating_point():
                    adapter.select(attacher.names[id(p)], p)

    def use(self, which: str | Mapping[str, float] | Sequence[str | None],
            train: str | None = None) -> None:
        """Choose what is active, and what of it trains."""
        tuned = self.tuned
        if any(a.selected for a in self.values()):
            refuse(tuned, "exchanging weights of the base")
        names = [which] if isinstance(which, str) else list(which)
        for n in names:
            if n is not None:
                self.known(n)
        if not names:
            raise ConfigError(f"use({which!r}) names no adapter (there is "
                              f"{', '.join(self)}); to run the base: tuned.disabled()")
        if isinstance(which, str):
            weights, rows = {which: 1.0}, None
        elif isinstance(which, Mapping):
            weights, rows = {n: float(w) for n, w in which.items()}, None
            check_mix(tuned, weights)
        else:
            weights, rows = {}, tuple(which)
            check_rows(tuned, rows)
        alone = next(iter(weights)) if list(weights.values()) == [1.0] else None
        merged = tuned.merged is not None
        if merged:
            tuned.check_plain() if rows is not None or train is not None else switch(tuned, weights)
        else:
            if train is not None and train != alone:
                check_train(tuned, weights, train)
            bring(tuned, weights)
        tuned.state.use(tuple(weights.items()), rows)
        tuned.state.training = alone if train is None else train
        if not merged:
            self.set_trainable()
        tuned.steps.checked = False

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None], copies: int = 1) -> Iterator[None]:
        """Inside, in this thread, each sample of a batch has its own adapter; None: the base.

            with tuned.adapters.rows(["french", None, "law"]):
                model.generate(**batch)

        What :meth:`use` has chosen stays for everybody else. Low-rank updates of linears run
        together, whatever their ranks: one product with the weight for all samples. Other updates
        run adapter by adapter.

        copies: so many samples of a batch that follow each other are one sample's (num_beams or
        num_return_sequences of ``generate``); a batch with one of each is taken too.

        Raises ConfigError for names that are unknown, for adapters that cannot differ from sample
        to sample (base weights they train, running statistics, prompts), and where what is in use
        has changed the base that all samples share. A call of another batch size: RecipeError.
        """
        tuned = self.tuned
        tuned.check_ready()
        if isinstance(names, str) or not names:
            raise ConfigError(f"rows({names!r}): expected a list with an adapter's name, or None, "
                              "for each sample")
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
            raise ConfigError(f"copies={copies!r}: expected a whole number from 1")
        for n in names:
            if n is not None:
                self.known(n)
        check_rows(tuned, tuple(names))
        for name in dict(tuned.state.active):
            if changed := {**self[name].selected, **moved_buffers(tuned, name)}:
                raise ConfigError(f"{name!r}, which is in use, has changed {next(iter(changed))}; "
                                  "tuned.use([...]) puts the base's values back first")
        with by_rows(tuned.state, tuple(names), copies):
            yield

    def set_trainable(self) -> None:
        """What is active alone trains, or what `use` was told; else several are for use."""
        settle(self.tuned.model, self.tuned.state)
        name = self.tuned.state.training
        for adapter in self.values():
            for p in adapter.selected.values():
                p.requires_grad_(False)
        if name is not None:
            adapter = self[name]
            for key, p in adapter.selected.items():
                p.requires_grad_(True)
                p.burnish_decay = adapter.decay[key]
        for _, _, slot in slots(self.tuned.model):
            for own, box in slot.named_children():
                if own in self:
                    for p in box.parameters():
                        p.requires_grad_(own == name and not getattr(p, "burnish_frozen", False))

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """What one is: its own tensors, the base tensors it trains, the buffers it has moved."""
        adapter = self.known(name)
        name = adapter.name
        out: dict[str, Tensor] = {}
        first = name == next(iter(self))             # its storages hold the base of all
        for key, value in self.tuned.model.state_dict(keep_vars=True).items():
            if f".{ATTR}.{name}." in f".{key}" or first and provider_of(key):
                out[key] = value.detach()
        values = {**adapter.values(), **moved_buffers(self.tuned, name)}
        for key, written in file_names(self.tuned, name).items():
            if key in values:
                out[written] = values[key]
        return out
