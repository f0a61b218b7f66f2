"""The tuned model: one recipe (or several, by name) joined to one model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.update.step import compose
from ..core.anatomy import Anatomy
from ..core.call import off
from ..core.errors import CheckError, ConfigError, nearest
from ..core.events import Timeline
from ..core.method import Method
from ..core.recipe import Recipe, parse
from .adapters import (
    Adapter,
    Before,
    bring,
    check_name,
    check_rows,
    check_storage,
    file_names,
    original,
)
from .attach import Attacher
from .base import Base
from .check import check
from .observe import Batches
from .originals import Originals
from .slot import slot_of, slots
from .state import State
from .step import Stepping, forward
from .summary import summary, table
from .swap import ATTR, unprovide, unswap

DEFAULT = "default"

#: tuned model -> its handle, without keeping either alive
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tuned]] = weakref.WeakKeyDictionary()


def tuned_of(model: nn.Module) -> Tuned | None:
    """The handle of a tuned model (a trainer's callback is given the model alone)."""
    handle = _OWNERS.get(model)
    tuned = handle() if handle is not None else None
    return tuned if tuned is not None and tuned.adapters else None


class Tuned(Stepping):
    """A model with a recipe joined to it. Made by :func:`burnish.tune` and :func:`burnish.load`.

    model: the same module that was given, changed in place.
    """

    def __init__(self, model: nn.Module, *, example: Any = None, calibration: Any = None):
        self.model = model
        _OWNERS[model] = weakref.ref(self)
        self.anatomy = Anatomy.of(model)
        self.calibration = Batches(calibration)
        self.adapters: dict[str, Adapter] = {}
        self.state = State()
        self.originals = Originals()
        self.current_optimizer: torch.optim.Optimizer | None = None
        self.total_steps: int | None = None
        self.base_lines: dict[str, str] = {}          # fingerprints of the originals, once read
        self._before = {n: p.requires_grad for n, p in model.named_parameters()}
        self._timeline: Timeline | None = None
        self._checked = False
        self.merged: Any = None                       # what unmerge needs (engine/merge.py)
        for p in model.parameters():
            p.requires_grad_(False)
        slot_of(model, self.state, "").root = True

    # -- recipes -------------------------------------------------------------------------------
    def add(self, name: str, recipe: str | Method | Iterable[str | Method], *, targets: Any = None,
            head: bool | str = False, seed: int = 0, calibration: Iterable[Any] | None = None,
            settled: Mapping[str, Any] | None = None) -> None:
        """Join another recipe under a name; it becomes active with :meth:`use`.

        calibration: batches for methods that read data first; default those given to `tune`.
        settled: what such methods decided once (a file knows it), so that they need no data.

        Raises RecipeError, TargetError; the model is left as it was when anything is refused.
        """
        self._not_merged()
        check_name(name, self.adapters)
        parsed = parse(recipe)
        check_storage(parsed, self.adapters)
        train_head = self.anatomy.head_kind == "classification" if head == "auto" else bool(head)
        adapter = Adapter(name, parsed, targets, train_head, seed, self.originals)
        adapter.settled = {part: dict(places) for part, places in (settled or {}).items()}
        batches = self.calibration if calibration is None else Batches(calibration)
        base = self.disabled if self.adapters else contextlib.nullcontext
        attacher = Attacher(self.model, self.anatomy, self.state, adapter,
                            (batches, self._run, base))
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        before = Before(self)
        try:
            compose([m.optimizer() for m in parsed if "optimizer" in m.axes()],
                    [("probe", nn.Parameter(torch.zeros(1)))], lr=0.0)     # its laws, refused now
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                attacher.attach(parsed)
            if train_head:
                self._train_head(adapter, attacher)
        except Exception:
            before.restore(self, name)
            raise
        adapter.notes = attacher.notes
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

    def _train_head(self, adapter: Adapter, attacher: Attacher) -> None:
        for path in self.anatomy.head:
            for leaf, p in self.model.get_submodule(path).named_parameters():
                if f".{ATTR}." not in f".{leaf}." and p.is_floating_point():
                    adapter.select(attacher.names[id(p)], p)

    def use(self, which: str | Mapping[str, float] | Sequence[str | None]) -> None:
        """Choose what is active: one adapter by name, a weighted mix, or one per sample.

        ``use("french")``; ``use({"french": .7, "law": .3})``; ``use(["french", None, "law"])``.
        A mix trains nothing; per-sample use serves batches of mixed origin.
        """
        self._not_merged()
        names = [which] if isinstance(which, str) else list(which)
        for n in names:
            if n is not None and n not in self.adapters:
                raise ConfigError(f"no adapter {n!r}{nearest(n, self.adapters)} "
                                  f"(there is {', '.join(self.adapters)})")
        if not names:
            raise ConfigError(f"use({which!r}) names no adapter (there is "
                              f"{', '.join(self.adapters)}); to run the base: tuned.disabled()")
        if isinstance(which, str):
            weights, rows = {which: 1.0}, None
        elif isinstance(which, Mapping):
            weights, rows = {n: float(w) for n, w in which.items()}, None
        else:
            weights, rows = {}, tuple(which)
            check_rows(self, {n for n in rows if n is not None})
        bring(self, weights)
        self.state.use(tuple(weights.items()), rows)
        self._set_trainable()
        self._checked = False

    def _set_trainable(self) -> None:
        """Only an adapter that is active alone trains; several at once are for use."""
        name = self.state.active[0][0] if [w for _, w in self.state.active] == [1.0] else None
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
        return self._active.recipe

    @property
    def _active(self) -> Adapter:
        names = [n for n, _ in self.state.active] or list(self.adapters)
        return self.adapters[names[0]]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in the model, parameter) of everything that trains."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that trains."""
        return (p for _, p in self.named_parameters())

    def summary(self) -> dict[str, Any]:
        """Per part: tensors, trainable parameters, bytes. ``print(tuned)`` shows it as a table."""
        return summary(self)

    def __repr__(self) -> str:
        return table(summary(self))

    # -- switching off, out and in -------------------------------------------------------------
    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, in this thread, the model answers as the base: what was added is left out, and
        base weights that train answer with the values they had. Nothing is written, so it may
        stand between a forward and its backward (distillation, a penalty against the base)."""
        self._not_merged()
        with off(self.state, Base(self.model, self.originals)):
            yield

    def detach(self) -> nn.Module:
        """The base, bit for bit: classes, parameters, flags as they were before ``tune``."""
        if self.merged is not None:
            self.unmerge()
        for path, module, slot in slots(self.model):
            for param, child in list(slot.providers.items()):
                value = slot._modules[child].weight() if (path, param) not in self.originals else \
                    self.originals.get(path, param).to(self.originals.home(path, param))
                slot.providers.pop(param)
                unprovide(module, param, value)
        for path, param in self.originals:
            owner = self.model.get_submodule(path)
            with torch.no_grad():
                owner.get_parameter(param).copy_(self.originals.get(path, param))
        self._leave()
        return self.model

    def _leave(self) -> None:
        for _, module, _ in slots(self.model):
            unswap(module)
        for n, p in self.model.named_parameters():
            p.requires_grad_(self._before.get(n, False))
            vars(p).pop("burnish_decay", None)
            vars(p).pop("burnish_resting", None)
        self.adapters.clear()
        self.originals.clear()
        self.current_optimizer = None

    def _not_merged(self) -> None:
        if self.merged is not None:
            raise ConfigError("the update is merged into the weights; call tuned.unmerge() first")

    # -- merging and files (see merge.py and formats) ------------------------------------------
    def merge(self) -> nn.Module:
        """The model with the active update in its weights and no trace of burnish.

        Raises CheckError with the reason when a part of the recipe has no form as a weight.
        :meth:`unmerge` brings everything back, bit for bit.
        """
        from .merge import merge

        return merge(self)

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit: the weights come back from where they waited and the
        update stands beside them again."""
        from .merge import unmerge

        unmerge(self)

    def save(self, folder: str | Path, **extra: Any) -> Path:
        """Write the adapter folder (see formats/folder.py). Atomic; never a pickle."""
        from ..formats.adapter import save

        return save(self, Path(folder), **extra)

    def terms(self, kind: type, name: str | None = None) -> Iterator[tuple[str, Any]]:
        """(place name, term) of every term of a class in an adapter (default: the active one)."""
        name = name or self._active.name
        for _, _, slot in slots(self.model):
            for part in slot.parts:
                if part.adapter == name and part.place is not None:
                    term = slot.module_of(part)
                    if isinstance(term, kind):
                        yield part.place.name, term

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """What an adapter is: its own tensors and the base tensors it trains, by name."""
        self._not_merged()
        name = name or self._active.name
        out: dict[str, Tensor] = {}
        mark = f"{ATTR}.{name}."
        for key, value in self.model.state_dict(keep_vars=True).items():
            if f".{mark}" in f".{key}":
                out[key] = value.detach()
        values = self.adapters[name].values()
        for key, written in file_names(self, name).items():
            out[written] = values[key]
        return out


def tune(model: nn.Module, recipe: str | Method | Iterable[str | Method], *, targets: Any = None,
         head: bool | str = "auto", calibration: Any = None, example: Any = None,
         seed: int = 0, name: str = DEFAULT, settled: Mapping[str, Any] | None = None) -> Tuned:
    """Join a recipe to a model, in place, and return the :class:`Tuned` handle.

    model: any ``torch.nn.Module``.
    recipe: an expression (``"nf4 + snella(rank=8) + checkpoint"``), a method or a list of them.
    targets: what the parts apply to that can be narrowed, text or a list; by default deltas and
        storage take every linear outside the head. Refused when no part uses them.
    head: "auto" trains a classification-like head and leaves a language-model head frozen.
    calibration: iterable of batches for methods that read data first.
    settled: what such methods decided once (:func:`burnish.load` knows it from the file).
    example: one batch; a traced step on fake tensors then proves, before anything runs, that
    every attached tensor is reached by forward and by gradient.
    seed: of everything that is drawn at the start.
    name: of this adapter, for :meth:`Tuned.use`.

    Raises RecipeError, TargetError, ConfigError (nothing is changed), CheckError (self-check).
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"tune expects a torch.nn.Module, not {type(model).__name__}")
    if ATTR in model._modules:
        raise ConfigError("this model is tuned already; use tuned.add(name, recipe) for another "
                          "adapter, or tuned.detach() first")
    if next(model.parameters(), None) is None:
        raise ConfigError(f"{type(model).__name__} has no parameters to tune")
    on_meta = next((n for n, p in model.named_parameters() if p.device.type == "meta"), None)
    if on_meta is not None:
        raise ConfigError(f"{on_meta} is on the meta device and has no values; load the weights "
                          "first (burnish.simulate takes models on meta)")
    parsed = parse(recipe)
    tuned = Tuned(model, example=example, calibration=calibration)
    try:
        tuned.add(name, parsed, targets=targets, head=head, seed=seed, settled=settled)
        if next(tuned.parameters(), None) is None:
            raise CheckError(f"nothing trains with {parsed}: add a part that trains something, "
                             f"e.g. full + {parsed} or lora(rank=8) + {parsed}")
        if example is not None:
            check(tuned, example)
    except Exception:
        tuned.detach()
        raise
    return tuned
