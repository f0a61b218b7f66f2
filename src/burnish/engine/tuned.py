"""The tuned model: one recipe (or several, by name) joined to one model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy
from ..core.call import off
from ..core.errors import ConfigError
from ..core.events import Timeline
from ..core.method import Method
from ..core.recipe import Recipe, parse
from ..core.sampling import Sampling
from ..core.site import Place
from ..core.stage import Stage
from .adapters import Adapter, Adapters, still_there
from .around import Each, Probe, Some, dropped, probe
from .base import Base
from .buffers import Buffers
from .leave import give_back
from .looking import branches, terms, weight
from .merge import merge, unmerge
from .observe import Batches
from .originals import Originals
from .owners import disown, own
from .persample import sample_norms
from .resize import Moments, resize_term
from .room import allowing
from .slot import slot_of
from .stages import run
from .state import State
from .step import Loss, Steps
from .summary import summary, table
from .undo import Transaction, all_or_nothing, to_the_end

DEFAULT = "default"
T = TypeVar("T")

class Tuned:
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
        self.adapters = Adapters(self)
        self.steps = Steps(self)
        self.state = State()
        self.originals = Originals()
        self.buffers = Buffers(model)
        self.total_steps: int | None = None
        self.sampling: Sampling | None = None         # how samples are drawn, where fit says it
        self.base_lines: dict[str, str] = {}          # fingerprints of the originals, once read
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self.merged: Any = None                       # what unmerge needs (engine/merge.py)
        undo.later(lambda: self._close("never joined to its model: tuning it was refused or "
                                       "interrupted"))
        own(model, self)
        for p in model.parameters():
            p.requires_grad_(False)
        self.state.looks_at(model)
        slot_of(model, self.state, "").root = True

    def recorded(self) -> list[Any]:
        """Whose attributes a change may touch, beside the model's modules (see undo.py)."""
        return [self.state, self.state.tape, self.anatomy, self.steps, *self.adapters.values()]

    @all_or_nothing
    def change(self, body: Callable[[], T]) -> T:
        """``body()``, done whole or not at all; it notes what it overwrites in ``self.undo``."""
        return body()

    def check_here(self) -> None:
        if self.gone is not None:
            raise ConfigError(self.gone)

    def check_plain(self) -> None:
        """Still joined to its model, and not merged into it."""
        self.check_here()
        if self.merged is not None:
            raise ConfigError("the update is merged into the weights; call tuned.unmerge() first")

    def check_ready(self) -> None:
        """What was added is there to be used."""
        self.check_plain()
        still_there(self)

    # -- recipes (see adapters.py) -------------------------------------------------------------
    @all_or_nothing
    def add(self, name: str, recipe: str | Method | Iterable[str | Method], *, targets: Any = None,
            head: bool | str = False, seed: int = 0, calibration: Iterable[Any] | None = None,
            settled: Mapping[str, Any] | None = None) -> None:
        """Join another recipe under a name; it becomes active with :meth:`use`.

        calibration: batches for methods that read data first; default those given to `tune`.
        settled: what such methods decided once (a file knows it), so that they need no data.

        Raises RecipeError, TargetError, and leaves the model as it was.
        """
        self.check_plain()
        self.adapters.add(name, parse(recipe), targets, head, seed, calibration, settled)

    @all_or_nothing
    def remove(self, name: str) -> None:
        """Take one adapter out: its tensors, the values it trained, its modes and notes. The form
        in which the base is held stays. Where it was active, the first of the others is used.

        An optimizer that was made for it says so at its next step: call :meth:`optimizer` again.

        Raises ConfigError for an unknown name, and for the only one (then :meth:`detach`)."""
        self.check_plain()
        self.adapters.remove(name)

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
        self.check_here() if self.merged is not None else self.check_ready()
        self.adapters.use(which, train)

    # -- what trains ---------------------------------------------------------------------------
    @property
    def recipe(self) -> Recipe:
        """The recipe that trains (of the active adapter)."""
        self.check_here()
        return self.active.recipe

    @property
    def active(self) -> Adapter:
        """The adapter that trains; where none does, the first in use."""
        return self.adapters.active

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
        self.check_here()
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that trains."""
        return (p for _, p in self.named_parameters())

    def summary(self) -> dict[str, Any]:
        """Per part: tensors, trainable parameters, bytes. ``print(tuned)`` shows it as a table."""
        self.check_here()
        return summary(self)

    def __repr__(self) -> str:
        if self.gone is not None:
            return f"Tuned(of a {type(self.model).__name__}; {self.gone.partition(';')[0]})"
        return table(summary(self))

    def terms(self, kind: type, name: str | None = None) -> Iterator[tuple[str, Any]]:
        """(place name, term) of every term of a class in an adapter (default: the active one)."""
        self.check_here()
        return terms(self.model, kind, self.adapters.known(name).name)

    def branches(self, kind: type, name: str | None = None) -> Iterator[tuple[str, Any]]:
        """(path, module) of every branch of a class in an adapter (default: the active one)."""
        self.check_here()
        return branches(self.model, kind, self.adapters.known(name).name)

    def weight(self, place: Place) -> Tensor:
        """The (out, in) view of what stands at a place, decoded where a storage holds it."""
        return weight(self.model, place)

    # -- training (see step.py) ----------------------------------------------------------------
    @contextlib.contextmanager
    def given(self, **keys: Any) -> Iterator[None]:
        """Inside, in this thread, every call has these keys of context (``task=2``), as if the
        batch had brought them: for ``generate`` and loops that pass inputs alone.

        Raises ConfigError for a key that no part of a recipe reads.
        """
        with self.state.reading(keys):
            yield

    def optimizer(self, lr: float = 1e-3, *, scaler: Any = None, **kw: Any
                  ) -> torch.optim.Optimizer:
        """The optimizer the recipe names (AdamW if it names none), with the recipe's events.

        Objectives, schedules, budgets and masks of the recipe hang on its ``step()``, so any
        loop that calls it runs the recipe right. `kw` goes to the innermost rule (betas, eps,
        weight_decay).

        accumulation: backward passes per update; a step inside backward must know, and objectives
        that cannot see the loss.  scaler: the loop's GradScaler, for the same two.
        max_grad_norm: all gradients of an update together are cut to this norm, objectives
        included; a step inside backward takes another pass for it. RecipeError where it cannot act.
        """
        return self.steps.make(lr, scaler=scaler, **kw)

    @property
    def current_optimizer(self) -> Any:
        """The optimizer that was made last, or None."""
        return self.steps.optimizer

    @property
    def timeline(self) -> Timeline:
        """Where the run stands. ConfigError before there is an optimizer."""
        return self.steps.timeline

    def check_gradients(self) -> None:
        """Every tensor that should train has a finite gradient, or CheckError names the others."""
        self.steps.check_gradients()

    def step(self, batch: Any, loss: Loss | None = None) -> Tensor:
        """One whole training step, right for every recipe; returns the loss (detached).

        batch: a mapping (passed as keywords), or ``(inputs, target)``, inputs a mapping or not.
        loss: ``loss(outputs, batch) -> scalar``; default: ``outputs.loss``, or scalar outputs.

        Raises BurnishError when the loss is not finite: nothing has been updated then.
        """
        self.check_plain()
        return self.steps.step(batch, loss)

    def around(self, whole: Callable[[], Tensor], alone: Callable[[], Tensor],
               each: Each | None = None, scale: Any = 1.0, some: Some | None = None) -> Tensor:
        """``whole()``, with what the recipe does around it, for loops that make their own passes.

        whole: forward and backward of one micro-batch, into ``.grad``; it may be called several
        times and means the same each time. alone: its loss without a backward. each: gives `whole`
        of each sample alone, at no scale (dp). scale: of its loss. some: gives (whole, alone, each)
        of the samples whose numbers it is told (uds). All return the loss."""
        return self.steps.around(whole, alone, each, scale, some)

    def backward(self, batch: Any, loss: Loss | None = None, *,
                 scale: Any = 1.0) -> Tensor:
        """Forward and backward of one micro-batch, right for every recipe that makes gradients;
        they are added to ``.grad``. Returns the loss (detached)::

            for batch in micro_batches:
                tuned.backward(batch, loss, scale=1 / len(micro_batches))
            opt.step()
            opt.zero_grad()

        scale: what the loss is multiplied by on its way back: a share, or ``scaler.get_scale()``
        times one. Raises BurnishError for a loss that is not finite, ConfigError beside an
        optimizer that makes no gradient.
        """
        self.check_plain()
        return self.steps.backward(batch, loss, scale)

    def probe(self, batch: Any, loss: Loss | None = None, *,
              grads: bool = True, statistics: bool = False) -> Probe:
        """The loss of a batch, and the gradients of what trains, without a trace: no event, no
        update, no optimizer state; ``.grad`` holds what it held, random generators stand where
        they stood (the next pass on this batch draws the same dropout), running statistics have
        not moved unless `statistics`. The model runs in the mode it is in.

        grads: False runs a forward alone. Beside a step inside backward all gradients exist at
        once meanwhile. Takes the memory of a step's forward and backward, plus what ``.grad``
        holds, plus the running statistics.
        """
        self.check_plain()

        def whole() -> Tensor:
            value = self.loss(batch, loss)
            if grads and value.requires_grad:
                value.backward()
            return value

        return probe(self, whole, grads, statistics)

    def loss(self, batch: Any, loss: Loss | None = None) -> Tensor:
        """The task's loss on a batch (see :meth:`step`). Going backward it takes the recipe's
        objectives along, at its own scale."""
        self.check_here()
        return self.steps.loss(batch, loss)

    def sample_norms(self, batch: Any, loss: Loss | None = None) -> Tensor:
        """(B,): the norm of each sample's own gradient, over everything that trains.

        A sample's gradient is its part of the batch's mean loss, times B; the model runs in
        evaluation mode (dropout off). Terms on linears need no gradient for it (the ghost norm).
        Nothing is updated, and no ``.grad`` is touched.
        """
        self.check_plain()
        trained = [p for _, p in self.named_parameters()]
        return sample_norms(self.model, trained, batch, lambda b: self.loss(b, loss))

    # -- switching off, out and in -------------------------------------------------------------
    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, in this thread, the model answers as the base: what was added is left out, and
        base weights that train and buffers that move answer with the values they had. Nothing is
        written, so it may stand between a forward and its backward (distillation, penalties)."""
        self.check_ready()
        with off(self.state, Base(self.model, self.originals, self.buffers)):
            yield

    dropped = dropped                                # see around.py

    @contextlib.contextmanager
    def cached(self, limit: int | str) -> Iterator[None]:
        """Inside, evaluation (``eval()`` and no gradients) may keep so many bytes of what it makes
        of weights and updates: ``with tuned.cached("4GB"): model.generate(...)``. Outside it is
        512 MiB. Keeping all of it takes the bytes of the weights that an update without a cheap
        path on tokens (snell, shira, bone), a convolution or attention's projection touches.

        Answers have the same bits either way. For all threads. ConfigError for what is no size.
        """
        self.check_ready()
        with allowing(self.state.room, limit):
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
        unmerge(self)
        give_back(self)
        self._close("detached: the model is its base again; burnish.tune(model, recipe) or "
                    "burnish.load(model, folder) joins a recipe to it anew")

    def _close(self, why: str) -> None:
        """This handle is of no more use, and neither is an optimizer it has made."""
        self.steps.let_go()
        self.state.room.clear()
        self.gone = why
        disown(self.model)
        self.adapters.clear()
        self.originals.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tuned:
        """A handle of a copy of the model; it makes its own optimizer."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items()})
        if twin.gone is None:
            own(twin.model, twin)
        return twin

    def __reduce__(self) -> Any:
        raise ConfigError("a handle is not pickled; tuned.save(folder) keeps what was trained and "
                          "burnish.load(model, folder) brings it back")

    # -- merging and files (see merge.py and formats) ------------------------------------------
    @all_or_nothing
    def merge(self) -> nn.Module:
        """The model with the active update in its weights and no trace of burnish.

        Raises CheckError with the reason when a part of the recipe has no form as a weight. Of
        biases that are new: engine/biases.py. :meth:`unmerge` brings everything back, bit for bit.
        """
        self.check_here()
        if self.merged is None:
            still_there(self)
        return merge(self)

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit: the weights come back from where they waited and the
        update stands beside them again."""
        self.check_here()
        if self.merged is None:
            raise ConfigError("nothing is merged: call merge() first")
        to_the_end(lambda: unmerge(self))

    def shrink(self, ragged: bool = False) -> nn.Module:
        """:meth:`merge`, then take out what was switched off (heads, inner channels, channels of
        the residual stream): a smaller dense model that saves and loads with its own library.
        :meth:`unmerge` brings everything back.

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

        self.check_ready()
        return save(self, Path(folder), whole=whole, **extra)

    def resize(self, term: Any, keep: Tensor | Mapping[str, Tensor] | None = None,
               fresh: Mapping[str, Tensor] | None = None, moments: Moments = "keep") -> None:
        """Change the rank of a term between steps: the components `keep` (indices, in this order,
        the same for all tensors or by tensor name; None: all), then `fresh` ones (tensor name ->
        slices to append). Parameters stay the same objects in the same groups of the optimizer;
        gradients and moments are cut and grown with them ("drop": the moments begin again),
        and the adapter's file knows the new rank. Raises ConfigError for a term without a rank
        axis, RecipeError where the optimizer's state has lost the shape (codes, projections);
        nothing is changed then.
        """
        self.check_plain()
        resize_term(self, term, keep, fresh, moments)

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """What an adapter is: its own tensors, the base tensors it trains and the buffers of the
        base it has moved, by name."""
        self.check_ready()
        return self.adapters.tensors(name)
