"""The tuned model: one recipe (or several, by name) joined to one model."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..blocks.update.step import compose
from ..core.anatomy import Anatomy
from ..core.call import off
from ..core.draw import drawn
from ..core.errors import ConfigError
from ..core.events import Timeline
from ..core.method import Method
from ..core.recipe import Recipe, parse
from ..core.stage import Stage
from .adapters import (
    Adapter,
    bring,
    check_mix,
    check_name,
    check_rows,
    check_storage,
    check_train,
    file_names,
    known,
    moved_buffers,
    original,
    still_there,
)
from .attach import Attacher
from .base import Base
from .buffers import Buffers
from .entries import switch
from .leave import give_back, take_out
from .looking import Looking
from .observe import Batches
from .originals import Originals
from .resize import resize_term
from .room import Evaluating
from .slot import slot_of, slots
from .stages import run
from .state import State
from .step import Stepping, forward
from .summary import summary, table
from .swap import ATTR
from .undo import Transaction, all_or_nothing, to_the_end

DEFAULT = "default"
T = TypeVar("T")

#: tuned model -> its handle, without keeping either alive
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tuned]] = weakref.WeakKeyDictionary()


def tuned_of(model: nn.Module) -> Tuned | None:
    """The handle of a tuned model (a trainer's callback is given the model alone)."""
    handle = _OWNERS.get(model)
    tuned = handle() if handle is not None else None
    return tuned if tuned is not None and tuned.gone is None else None


class Tuned(Stepping, Looking, Evaluating):
    """A model with a recipe joined to it. Made by :func:`burnish.tune` and :func:`burnish.load`.

    model: the same module that was given, changed in place.

    `add`, `use`, `remove` and `merge` are done whole or leave everything as it was, whatever
    interrupts them; `detach` and `unmerge` are carried to their end. After `detach` the handle is
    of no more use: everything but another `detach` raises ConfigError.
    """

    def __init__(self, model: nn.Module, undo: Transaction, *, calibration: Any = None,
                 filled: bool = False):
        self.model = model
        self.filled = filled                          # a file is about to give all values
        self.gone: str | None = None                  # why this handle is of no more use
        self.undo: Transaction | None = undo          # the change that is being made
        self.anatomy = Anatomy.of(model)
        self.calibration = Batches(calibration)
        self.adapters: dict[str, Adapter] = {}
        self.state = State()
        self.originals = Originals()
        self.buffers = Buffers(model)
        self.current_optimizer: torch.optim.Optimizer | None = None
        self.total_steps: int | None = None
        self.base_lines: dict[str, str] = {}          # fingerprints of the originals, once read
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self._timeline: Timeline | None = None
        self._checked = False
        self.merged: Any = None                       # what unmerge needs (engine/merge.py)
        undo.later(lambda: self._close("never joined to its model: tuning it was refused or "
                                       "interrupted"))
        _OWNERS[model] = weakref.ref(self)
        for p in model.parameters():
            p.requires_grad_(False)
        self.state.fused = any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
        slot_of(model, self.state, "").root = True

    def recorded(self) -> list[Any]:
        """Whose attributes a change may touch, beside the model's modules (see undo.py)."""
        return [self.state, self.state.tape, self.anatomy, *self.adapters.values()]

    @all_or_nothing
    def change(self, body: Callable[[], T]) -> T:
        """``body()``, done whole or not at all; it notes what it overwrites in ``self.undo``."""
        return body()

    def _here(self) -> None:
        if self.gone is not None:
            raise ConfigError(self.gone)

    def _plain(self) -> None:
        """Still joined to its model, and not merged into it."""
        self._here()
        if self.merged is not None:
            raise ConfigError("the update is merged into the weights; call tuned.unmerge() first")

    def _ready(self) -> None:
        """What was added is there to be used."""
        self._plain()
        still_there(self)

    # -- recipes -------------------------------------------------------------------------------
    @all_or_nothing
    def add(self, name: str, recipe: str | Method | Iterable[str | Method], *, targets: Any = None,
            head: bool | str = False, seed: int = 0, calibration: Iterable[Any] | None = None,
            settled: Mapping[str, Any] | None = None) -> None:
        """Join another recipe under a name; it becomes active with :meth:`use`.

        calibration: batches for methods that read data first; default those given to `tune`.
        settled: what such methods decided once (a file knows it), so that they need no data.

        Raises RecipeError, TargetError; the model is left as it was when anything is refused.
        """
        self._plain()
        check_name(name, self.adapters)
        parsed = parse(recipe)
        check_storage(parsed, self.adapters)
        compose([m.optimizer() for m in parsed if "optimizer" in m.axes()],
                [("probe", nn.Parameter(torch.zeros(1)))], lr=0.0)         # its laws, refused now
        train_head = self.anatomy.head_kind == "classification" if head == "auto" else bool(head)
        adapter = Adapter(name, parsed, targets, train_head, seed, self.originals,
                          filled=self.filled)
        adapter.settled = {part: dict(places) for part, places in (settled or {}).items()}
        batches = self.calibration if calibration is None else Batches(calibration)
        base = self.disabled if self.adapters else contextlib.nullcontext
        attacher = Attacher(self.model, self.anatomy, self.state, adapter,
                            self.undo, (batches, self._run, base))
        known = set(self.originals)
        self.undo.later(lambda: [self.originals.forget(*k) for k in set(self.originals) - known])
        with drawn(seed):
            attacher.attach(parsed)
        if train_head:
            self._train_head(adapter, attacher)
        adapter.notes = attacher.notes
        adapter.parts = [(path, part.key) for path, _, slot in slots(self.model)
                         for part in slot.parts if part.adapter == name]
        self.adapters[name] = adapter
        for key, p in adapter.selected.items():
            path, _, leaf = key.rpartition(".")
            self.originals.put(path, leaf, p)
        if len(self.adapters) == 1:
            self.use(name)
        else:                                    # it starts from the base's values, not another's
            adapter.away = {k: original(self, k).to(p.device, copy=True)
                            for k, p in adapter.selected.items()}
            self._set_trainable()

    def _run(self, batch: Any, loss: bool = False) -> Any:
        """One batch through the model, for a data pass."""
        return self.loss(batch) if loss else forward(self.model, batch)

    @all_or_nothing
    def remove(self, name: str) -> None:
        """Take one adapter out: its tensors, the values it trained, its modes and notes. The form
        in which the base is held stays. Where it was active, the first of the others is used.

        An optimizer that was made for it says so at its next step: call :meth:`optimizer` again.

        Raises ConfigError for an unknown name, and for the only adapter (then :meth:`detach`).
        """
        self._plain()
        known(self, name)
        if len(self.adapters) == 1:
            raise ConfigError(f"{name!r} is the only adapter; tuned.detach() gives back the base")
        active = {n for n, _ in self.state.active} | set(self.state.rows or ())
        if name in active:
            self.use(next(n for n in self.adapters if n != name))
        take_out(self, name)
        self._set_trainable()
        self._checked = False

    def _train_head(self, adapter: Adapter, attacher: Attacher) -> None:
        for path in self.anatomy.head:
            for leaf, p in self.model.get_submodule(path).named_parameters():
                if f".{ATTR}." not in f".{leaf}." and p.is_floating_point():
                    adapter.select(attacher.names[id(p)], p)

    @all_or_nothing
    def use(self, which: str | Mapping[str, float] | Sequence[str | None],
            train: str | None = None) -> None:
        """Choose what is active: one adapter by name, a weighted mix, or one per sample.

        ``use("french")``; ``use({"french": .7, "law": .3})``; ``use(["french", None, "law"])``.
        A mix trains nothing, unless `train` names the one of its adapters (at weight 1) that does
        while the others stay as they are: ``use({"old": 1, "new": 1}, train="new")``. Per-sample
        use serves batches of mixed origin.

        In a merged model, adapters that change single entries (shira) are exchanged in place: the
        old entries come back, the new ones are written. Others are refused there (ConfigError).
        """
        self._here() if self.merged is not None else self._ready()
        names = [which] if isinstance(which, str) else list(which)
        for n in names:
            if n is not None:
                known(self, n)
        if not names:
            raise ConfigError(f"use({which!r}) names no adapter (there is "
                              f"{', '.join(self.adapters)}); to run the base: tuned.disabled()")
        if isinstance(which, str):
            weights, rows = {which: 1.0}, None
        elif isinstance(which, Mapping):
            weights, rows = {n: float(w) for n, w in which.items()}, None
            check_mix(self, weights)
        else:
            weights, rows = {}, tuple(which)
            check_rows(self, rows)
        alone = next(iter(weights)) if list(weights.values()) == [1.0] else None
        if self.merged is not None:
            self._plain() if rows is not None or train is not None else switch(self, weights)
        elif train is not None and train != alone:
            check_train(self, weights, train)
        if self.merged is None:
            bring(self, weights)
        self.state.use(tuple(weights.items()), rows)
        self.state.training = alone if train is None else train
        if self.merged is None:
            self._set_trainable()
        self._checked = False

    def _set_trainable(self) -> None:
        """What is active alone trains, or what `use` was told; else several are for use."""
        name = self.state.training
        for adapter in self.adapters.values():
            for p in adapter.selected.values():
                p.requires_grad_(False)
        if name is not None:
            adapter = self.adapters[name]
            for key, p in adapter.selected.items():
                p.requires_grad_(True)
                p.burnish_decay = adapter.decay[key]
        for _, _, slot in slots(self.model):
            for own, box in slot.named_children():
                if own in self.adapters:
                    for p in box.parameters():
                        p.requires_grad_(own == name and not getattr(p, "burnish_frozen", False))

    # -- what trains ---------------------------------------------------------------------------
    @property
    def recipe(self) -> Recipe:
        """The recipe that trains (of the active adapter)."""
        self._here()
        return self._active.recipe

    @property
    def _active(self) -> Adapter:
        names = [n for n, _ in self.state.active] or list(self.adapters)
        return self.adapters[self.state.training or names[0]]

    @property
    def training(self) -> str | None:
        """The adapter that trains; None where a mix or per-sample adapters are in use."""
        return self.state.training

    def run(self, stages: Iterable[Stage], data: Callable[[Stage], Iterable[Any]],
            loss: Callable[[Any, Any], Tensor] | None = None, total: int | None = None,
            **optimizer: Any) -> Iterator[tuple[Stage, int, Tensor]]:
        """Train in stages (core/stage.py), an update per item: (stage, its update, the loss).

        data: the batches of a stage.  total: updates of the whole run, where stages take shares of
        it.  optimizer: for :meth:`optimizer`, made anew for each stage.
        Raises DataError when the data of a stage end before its updates are done.
        """
        return run(self, stages, data, loss, total, **optimizer)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of everything that trains."""
        self._here()
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that trains."""
        return (p for _, p in self.named_parameters())

    def summary(self) -> dict[str, Any]:
        """Per part: tensors, trainable parameters, bytes. ``print(tuned)`` shows it as a table."""
        self._here()
        return summary(self)

    def __repr__(self) -> str:
        if self.gone is not None:
            return f"Tuned(of a {type(self.model).__name__}; {self.gone.partition(';')[0]})"
        return table(summary(self))

    # -- switching off, out and in -------------------------------------------------------------
    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, in this thread, the model answers as the base: what was added is left out, and
        base weights that train and buffers that move answer with the values they had. Nothing is
        written, so it may stand between a forward and its backward (distillation, a penalty
        against the base)."""
        self._ready()
        with off(self.state, Base(self.model, self.originals, self.buffers)):
            yield

    def detach(self) -> nn.Module:
        """The base, bit for bit: classes, parameters, buffers, flags as they were before ``tune``.

        What has been done to the model since by others (moved to a device or a dtype, a module
        replaced, an embedding resized) stays. The handle is of no more use; detaching again does
        nothing.
        """
        if self.gone is None:
            to_the_end(self._leave)
        return self.model

    def _leave(self) -> None:
        if self.merged is not None:
            self._unmerge()
        give_back(self)
        self._close("detached: the model is its base again; burnish.tune(model, recipe) or "
                    "burnish.load(model, folder) joins a recipe to it anew")

    def _close(self, why: str) -> None:
        """This handle is of no more use, and neither is an optimizer it has made."""
        self.let_go()
        self.state.room.clear()
        self.gone = why
        if tuned_of(self.model) is None:
            _OWNERS.pop(self.model, None)
        self.adapters.clear()
        self.originals.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tuned:
        """A handle of a copy of the model; it makes its own optimizer."""
        twin = memo[id(self)] = object.__new__(type(self))
        own = {k: v for k, v in vars(self).items()
               if k not in ("current_optimizer", "_timeline", "_objectives")}
        twin.current_optimizer = twin._timeline = twin._objectives = None
        vars(twin).update({k: copy.deepcopy(v, memo) for k, v in own.items()})
        if twin.gone is None:
            _OWNERS[twin.model] = weakref.ref(twin)
        return twin

    def __reduce__(self) -> Any:
        raise ConfigError("a handle is not pickled; tuned.save(folder) keeps what was trained and "
                          "burnish.load(model, folder) brings it back")

    # -- merging and files (see merge.py and formats) ------------------------------------------
    @all_or_nothing
    def merge(self) -> nn.Module:
        """The model with the active update in its weights and no trace of burnish.

        Raises CheckError with the reason when a part of the recipe has no form as a weight.
        :meth:`unmerge` brings everything back, bit for bit.
        """
        from .merge import merge

        self._here()
        if self.merged is None:
            still_there(self)
        return merge(self)

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit: the weights come back from where they waited and the
        update stands beside them again."""
        self._here()
        if self.merged is None:
            raise ConfigError("nothing is merged: call merge() first")
        to_the_end(self._unmerge)

    def _unmerge(self) -> None:
        from .merge import unmerge

        if self.merged is not None:
            unmerge(self)

    def shrink(self, ragged: bool = False) -> nn.Module:
        """:meth:`merge`, then take out what was switched off (heads, channels): a smaller dense
        model that saves and loads with its own library. :meth:`unmerge` brings everything back.

        ragged: go on where blocks end with different sizes, or the config has no words for them.
        Raises ConfigError when nothing is switched off, CheckError when the sliced model would
        answer otherwise than the masked one or its config could not describe it.
        """
        from .shrink import shrink

        return shrink(self, ragged)

    def save(self, folder: str | Path, whole: bool = False, **extra: Any) -> Path:
        """Write the adapter folder (see formats/folder.py). Atomic; never a pickle.

        whole: with what serves training alone (the MLP that makes a prefix), so that training can
        go on from the file; otherwise what answers, in its smallest form.
        """
        from ..formats.written import save

        self._ready()
        return save(self, Path(folder), whole=whole, **extra)

    def resize(self, term: Any, keep: Tensor | Mapping[str, Tensor] | None = None,
               fresh: Mapping[str, Tensor] | None = None) -> None:
        """Change the rank of a term between steps: the components `keep` (indices, in this order,
        the same for all tensors or by tensor name; None: all), then `fresh` ones (tensor name ->
        slices to append).

        Parameters stay the same objects in the same groups of the optimizer; gradients and
        moments are cut and grown with them, and the adapter's file knows the new rank. Raises
        ConfigError for a term without a rank axis, RecipeError where the optimizer's state has
        lost the shape (codes, projections); nothing is changed then.
        """
        self._plain()
        resize_term(self, term, keep, fresh)

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """What an adapter is: its own tensors, the base tensors it trains and the buffers of the
        base it has moved, by name."""
        self._ready()
        adapter = known(self, name) if name else self._active
        name = adapter.name
        out: dict[str, Tensor] = {}
        mark = f"{ATTR}.{name}."
        for key, value in self.model.state_dict(keep_vars=True).items():
            if f".{mark}" in f".{key}":
                out[key] = value.detach()
        values = {**adapter.values(), **moved_buffers(self, name)}
        for key, written in file_names(self, name).items():
            if key in values:
                out[written] = values[key]
        return out
