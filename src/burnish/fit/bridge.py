"""burnish inside somebody else's loop: one line for `transformers.Trainer` and everything on it.

::

    tuned = burnish.tune(model, "lora(rank=8)")
    Trainer(model, args, ..., optimizers=(tuned.optimizer(1e-3), None),
            callbacks=[burnish.TrainerCallback(tuned)])

The recipe's events hang on the optimizer; the callback adds what only a loop knows: how many steps
there will be, and when a checkpoint is written.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers

from ..core.errors import ConfigError
from ..engine.stages import stages_of
from ..engine.swap import ATTR
from ..engine.tuned import Tuned
from ..formats import claim
from ..formats.folder import CARD, CONFIG, RUN, TENSORS


class TrainerCallback(transformers.TrainerCallback):
    """Runs a recipe right in a `transformers.Trainer` (TRL's included), and saves its adapter.

    tuned: what :func:`burnish.tune` returned; None finds it by the trained model.

    At the start it tells the recipe the number of steps, and refuses a loop whose optimizer would
    silently leave parts of the recipe out. At the first step it checks that everything that should
    train has a finite gradient (CheckError). At every save the adapter folder is written into the
    checkpoint, and at the end into the output folder.
    """

    def __init__(self, tuned: Tuned | None = None):
        self.tuned = tuned
        self._checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None,
                       optimizer: Any = None, **kw: Any) -> None:
        tuned = self.tuned = self.tuned or _owner(model)
        output = Path(args.output_dir)           # refused now rather than after the training
        claim.refuse_overlap(output, [("the base model", getattr(model, "name_or_path", None))])
        claim.refuse_foreign(output, (CONFIG, TENSORS, RUN), "adapter")
        if stages := stages_of(tuned):
            raise ConfigError(f"{tuned.recipe} trains in {len(stages)} stages, and this trainer "
                              "has one optimizer for all of them; burnish.fit drives them, or "
                              "tuned.run(...) in a loop of your own")
        tuned.total_steps = state.max_steps
        _fused(tuned)
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not tuned.current_optimizer:
            parts = [m.name for m in tuned.recipe
                     if {"optimizer", "controller", "objective"} & set(m.axes())]
            if parts:
                raise ConfigError(
                    f"{' and '.join(parts)} act through the optimizer, and this trainer made its "
                    "own; pass optimizers=(tuned.optimizer(lr), None)")

        if around := [m.name for m in tuned.recipe if "around_step" in m.relies_on]:
            raise ConfigError(
                f"{' and '.join(around)} acts around the forward and backward, which this trainer "
                "makes by itself; use burnish.fit, or a loop of tuned.backward(batch, loss)")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if not self._checked and self.tuned is not None:
            self._checked = True
            self.tuned.check_gradients()

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.is_world_process_zero and self.tuned is not None:
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", whole=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.is_world_process_zero and self.tuned is not None:
            self._write(Path(args.output_dir))

    def _write(self, folder: Path, whole: bool = False) -> None:
        """The adapter, beside whatever the trainer has written there: its model card stays."""
        assert self.tuned is not None
        theirs = (folder / CARD).exists() and not claim.Mark.of(folder).owns(folder, CARD)
        self.tuned.save(folder, whole=whole, card=False if theirs else None)


def _fused(tuned: Tuned) -> None:
    """TRL puts a forward of its own into a model, which (asked for ``fused_lm_head``) calls the
    model's parts and multiplies by the head's weight. It runs as the model's own would, so that
    what hangs on the whole model (the tape, keys of the batch, losses beside the task's) is there.

    Raises ConfigError where the recipe adds to the head, which such a forward does not call.
    """
    model = tuned.model
    theirs = vars(model).get("forward")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if theirs is None or head is None or getattr(theirs, "within", None) is tuned:
        return
    added = [n for n, p in head.named_parameters() if f".{ATTR}." in f".{n}"]
    if added:
        path = next(n for n, m in model.named_modules() if m is head)
        raise ConfigError(f"{tuned.recipe} adds to {path}, and this trainer multiplies by its "
                          "weight without calling it: leave the head out of targets=, or use "
                          "burnish.fit")
    slot = model._modules[ATTR]

    @functools.wraps(theirs)
    def forward(*args: Any, **kw: Any) -> Any:
        if not kw.get("fused_lm_head"):              # theirs goes on to the model's own
            return theirs(*args, **kw)
        return slot.run(model, lambda _, *a, **k: theirs(*a, **k), args, kw)

    forward.within = tuned                           # type: ignore[attr-defined]
    model.forward = forward


def _owner(model: Any) -> Tuned:
    from ..engine.owners import tuned_of

    while hasattr(model, "module"):  # DDP and its like
        model = model.module
    found = tuned_of(model)
    if found is None:
        raise ConfigError("the trained model has no recipe; call burnish.tune(model, recipe) "
                          "before the trainer is made")
    return found
