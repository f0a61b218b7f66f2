"""The loop under ``burnish.fit``. The one file that imports `transformers.Trainer`.

What is ours here: the optimizer and the events of the recipe, batches whose order is a function of
seed and epoch, checkpoints that are whole and free of pickles, a run that goes on bit for bit where
it stopped, and a loss that is looked at before it can do harm.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import SaveStrategy

from ..blocks.update.precise import NotFinite
from ..core.batches import call
from ..core.errors import BurnishError, FormatError
from ..core.processes import anywhere, here
from ..engine.spread import let_go
from ..engine.tuned import Tuned
from ..formats import safe
from ..formats.folder import finite
from ..formats.placed import put
from . import checkpoint, state
from .checkpoint import is_owed
from .driving import Compared, Driven, Smoothed, go_on_by, kept_of
from .moments import Moments
from .order import Ordered
from .passing import Passing
from .stages import Leg, Past
from .stages import facts_of as stage_facts
from .tasks import Task

STATE = "trainer_state.json"
#: settings of the update that a resumed run may be given anew (the rate has its schedule)
_ASKED = ("weight_decay", "betas", "eps")
#: what the task's loss is called until the trainer has written its own
_PLAIN = "loss_per_answer"


class Trainer(Compared, Passing, Ordered, transformers.Trainer):
    """`transformers.Trainer`, for a tuned model."""

    def __init__(self, tuned: Tuned, task: Task, args: transformers.TrainingArguments, *,
                 keep: int | None, hyper: dict[str, Any], fingerprint: str, leg: Leg, past: Past,
                 stages: list[tuple[str, int]], moments: Moments, **kw: Any):
        self.tuned, self.task, self.keep, self.hyper = tuned, task, keep, hyper
        self.moments = moments
        self.fingerprint, self.leg, self.past, self.stages = fingerprint, leg, past, stages
        self.plain = not isinstance(tuned.model, transformers.PreTrainedModel)
        self.zeroth, self.mistakes = False, dict[str, Any]()
        self._looked_at: Any = None  # the rows of an evaluation
        self._pending = False  # an evaluation that the newest checkpoint has not seen
        self._resumed: tuple[list[float], bool] | None = None
        self._rng: dict[str, Any] | None = None
        self._began, self._earlier = time.perf_counter(), past.seconds
        if tuned.state.shards is not None:       # nothing is left to wrap
            tuned.model._is_accelerate_prepared = True
        super().__init__(model=tuned.model, args=args, data_collator=task.collate,
                         compute_metrics=self._figures,
                         preprocess_logits_for_metrics=kept_of(task), **kw)
        # most models take the number of items and do not read it; theirs is a mean to be shared
        self.model_accepts_loss_kwargs &= task.counts_items
        self.pop_callback(PrinterCallback)
        if self.label_smoother is not None:
            self.label_smoother = Smoothed(self.label_smoother.epsilon)

    def seconds(self) -> float:
        """Spent on this run so far, in earlier stages and sessions too."""
        return self._earlier + time.perf_counter() - self._began

    @property
    def step(self) -> int:
        """Updates of the whole run so far; the trainer's own count is of its stage."""
        return self.leg.before + self.state.global_step

    def over(self) -> Past:
        """What this leg leaves behind, with what those before it have left."""
        seconds, rate = self.seconds(), self.args.learning_rate
        own = [{**h, "step": self.leg.before + h["step"]} for h in self.state.log_history]
        stages = self.past.stages
        if self.leg.stage is not None:
            stages = [*stages, stage_facts(self.leg, self.tuned, self.state, rate,
                                           seconds - self.past.seconds)]
        return Past(seconds, [*self.past.history, *own], stages, self.past.truth)

    def look_at(self, task: Task) -> None:
        """Evaluate another task from now on."""
        self.task, self.data_collator = task, task.collate
        self.preprocess_logits_for_metrics = kept_of(task)

    def let_go(self) -> None:
        """Nothing of the update stays: a later stage has an optimizer of its own."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.tuned.steps.let_go()
        self.accelerator.free_memory()
        gc.collect()                            # trainers hold themselves in circles

    def train(self, *args: Any, **kw: Any) -> Any:
        self._began = time.perf_counter()
        return super().train(*args, **kw)

    def _figures(self, prediction: Any) -> dict[str, float]:
        told = (*prediction.predictions, self.task.right(prediction.label_ids))
        self.mistakes = self.task.mistakes(*told)
        found = self.task.figures(*told, self._looked_at)
        return {_PLAIN: found.pop("loss"), **found}

    def evaluation_loop(self, dataloader: Any, *args: Any, **kw: Any) -> Any:
        """The loss is the task's own, per answer: not smoothed, not a mean of batches' means."""
        self._looked_at = dataloader.dataset
        made = super().evaluation_loop(dataloader, *args, **kw)
        let_go(self.tuned)                      # of shares: what logits were read by
        prefix = next((k.removesuffix(_PLAIN) for k in made.metrics if k.endswith(_PLAIN)), None)
        if prefix is not None:
            made.metrics[f"{prefix}loss"] = made.metrics.pop(f"{prefix}{_PLAIN}")
        return made

    # -- the step ------------------------------------------------------------------------------
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            made = self.tuned.optimizer(self.args.learning_rate, **self.hyper)
            self.zeroth = bool(getattr(made, "zeroth_order", False))
            if self.zeroth:
                made.stops = True
            self.optimizer = Driven(made) if self.zeroth else made
        return self.optimizer

    def create_scheduler(self, num_training_steps: int,
                         optimizer: torch.optim.Optimizer | None = None) -> Any:
        """A warm-up and decay of the stage's own, or the whole run's from where it stands."""
        stage = self.leg.stage
        if stage is None or stage.schedule == "restart" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        made = super().create_scheduler(int(self.leg.total or num_training_steps), optimizer)
        go_on_by(made, {**made.state_dict(), "last_epoch": self.leg.before,
                         "_step_count": self.leg.before + 1})
        return made

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
                      ) -> torch.Tensor:
        if not self.zeroth:
            return self._pass(super().training_step, model, inputs, num_items_in_batch)
        model.train()
        batch, loss = self.task.call(self._prepare_inputs(inputs), self.plain, self._smoothing())
        try:
            value = torch.as_tensor(self.tuned.step(batch, loss))
        except NotFinite as e:
            self._must_be_finite(torch.tensor(e.loss), "loss")
            raise
        self._must_be_finite(value, "loss")
        return value.detach().to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        if self.plain or self.task.own_loss:
            riding, (batch, own) = self.tuned.state.riding, \
                self.task.call(inputs, self.plain, self._smoothing())
            with riding.to_join():
                logits = self.task.logits(call(model, batch))
            loss = riding.join(own(logits, riding.asked(batch)))
            made: Any = (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
        else:
            with self._plainly():
                made = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self._must_be_finite(made[0] if return_outputs else made, "loss")
        return made

    def _smoothing(self) -> float:
        """Of the labels, while it trains; figures are of the plain loss."""
        return self.args.label_smoothing_factor if self.model.training else 0.0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        if self.zeroth:
            return 0.0
        if getattr(self.tuned.current_optimizer, "in_backward", False):
            found = self.tuned.current_optimizer.clip.found
            return 0.0 if found is None else float(found)
        norm = float(super()._get_grad_norm(model, grad_norm))
        if self.accelerator.scaler is None:
            self._must_be_finite(torch.tensor(norm), "norm of the gradients")
        return norm

    def _must_be_finite(self, value: torch.Tensor, what: str) -> None:
        """Stops before anything is updated, and keeps the state of the step before."""
        value = value.detach()
        if not self._anywhere(not math.isfinite(float(value))):
            return
        step = self.step
        kept = self._keep_last()
        raise BurnishError(
            f"the {what} is {float(value)} at step {step + 1} (epoch {self.state.epoch or 0:.2f}); "
            f"nothing was updated: the state after step {step} is kept in {kept}; try a smaller "
            "learning rate, or look at the rows of that step")

    def _anywhere(self, true: bool) -> bool:
        """In any process: what stops one stops all."""
        return anywhere(true) if self.args.world_size > 1 else true

    def _rows(self) -> int:
        """Rows of an update, over all processes and micro-batches."""
        return self.args.train_batch_size * self.args.world_size \
            * self.args.gradient_accumulation_steps

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.tuned.state.shards is None:      # shares are where they should be
            super()._move_model_to_device(model, device)

    def _keep_last(self) -> str:
        folder = self._folder()
        if not checkpoint.whole(folder):
            self._write(folder, self._rng)
        return str(folder)

    # -- when what happens ---------------------------------------------------------------------
    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any,
                                 *args: Any, **kw: Any) -> None:
        """Saves before it evaluates: an evaluation that fails must not cost the run."""
        both = (self.control.should_save and self.control.should_evaluate
                and self.args.save_strategy != SaveStrategy.BEST)
        if both:
            self._pending, self.control.should_evaluate = True, False
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
            self.control.should_evaluate, self.control.should_save = True, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
        if both:
            self._evaluated()
        self._rng = state.random_state()

    def _evaluated(self) -> None:
        """Writes what the evaluation found into the checkpoint that preceded it."""
        self._pending = False
        folder = self._folder()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save and folder.exists():
            checkpoint.rewrite(folder, STATE, self._state_text())
            checkpoint.settle(folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of evaluations that are as good the one of least loss: a figure that has not moved yet
        would give back what was there before training."""
        if super()._determine_best_metric(metrics, trial):
            return True
        name = "eval_" + str(self.args.metric_for_best_model).removeprefix("eval_")
        was = next((h["eval_loss"] for h in reversed(self.state.log_history)
                    if h.get("step") == self.state.best_global_step and "eval_loss" in h), None)
        if was is None or metrics[name] != self.state.best_metric or metrics["eval_loss"] >= was:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def evaluate(self, *args: Any, **kw: Any) -> dict[str, float]:
        """Draws nothing from the run's random generators, so that it can be repeated or left."""
        before = state.random_state()
        try:
            return super().evaluate(*args, **kw)
        finally:
            state.set_random_state(before)

    # -- checkpoints -----------------------------------------------------------------------------
    def _folder(self) -> Path:
        return Path(self.args.output_dir) / f"{checkpoint.PREFIX}{self.step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self._folder()
        if self.state.best_global_step:
            best = folder.with_name(
                f"{checkpoint.PREFIX}{self.leg.before + self.state.best_global_step}")
            if best.exists() or best == folder:
                self.state.best_model_checkpoint = str(best)
        self._write(folder, None)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoint.rotate(Path(self.args.output_dir), self.keep, Path(best) if best else None)

    def _write(self, folder: Path, rng: dict[str, Any] | None) -> None:
        """One whole checkpoint, or none. rng: generators as they were; None takes them now."""
        bad = [n for n, p in self.tuned.named_parameters() if not finite(here(p))]
        if self._anywhere(bool(bad)):
            what = bad[0] if bad else "what another process trains"
            raise BurnishError(f"{what} is not finite after step {self.step}; "
                               "nothing was saved, the checkpoints before it are untouched")
        optimizer = self.tuned.current_optimizer
        rank, scaler = self.args.process_index, self.accelerator.scaler
        hidden = checkpoint.hidden_name(folder)
        with checkpoint.writing(folder) if self.args.should_save else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            state.save_tree(rng or state.random_state(), hidden, f"rng-{rank}")
            if self.args.should_save or self.tuned.state.shards is not None:
                with self.moments.watched("save", self.tuned.model, self.tuned):
                    self.tuned.save(hidden, whole=True)      # those who have shares give them
                kept = state.optimizer_state(optimizer, self._named())
            if self.args.should_save:
                state.save_tree(kept, hidden, "optimizer")
                state.save_tree({
                    "scheduler": self.lr_scheduler.state_dict(),
                    "timeline": self.tuned.timeline.state(),
                    "data": self.fingerprint, "recipe": str(self.tuned.recipe),
                    "seed": self.args.seed, "processes": self.args.world_size,
                    "rows": self._rows(), "order": self._order,
                    "samples": len(self.train_dataset),
                    "losses": [float(self._tr_loss), self._total_loss_scalar,
                               self._globalstep_last_logged],
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "seconds": self.seconds(), "stage": self.leg.number,
                    "stages": self.stages, "past": self.past.kept(),
                }, hidden, "loop")
                if self._pending:
                    checkpoint.owe(hidden)
                buffers = _buffers(self.tuned.model)
                if buffers:
                    safe.save_file(buffers, hidden / "buffers.safetensors")
                safe.write_text(hidden / STATE, self._state_text())
            self.accelerator.wait_for_everyone()

    def _state_text(self) -> str:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        kept = asdict(self.state)
        return json.dumps(kept, indent=1, sort_keys=True, default=str) + "\n"

    # -- going on --------------------------------------------------------------------------------
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter and the model's buffers, strictly: names and shapes must agree."""
        folder = Path(resume_from_checkpoint)
        kept = state.load_tree(folder, "loop")
        # the order of rows does not know how many processes share the rows of an update
        shared = "rows" if "rows" in kept else "processes"
        unsaid = {"order": self._order, "samples": len(self.train_dataset)}
        older = unsaid | {"order": "random"}                   # of checkpoints that do not say it
        for what, now in (("recipe", str(self.tuned.recipe)), ("data", self.fingerprint),
                          ("seed", self.args.seed), *unsaid.items(),
                          (shared, self._rows() if shared == "rows" else self.args.world_size)):
            if (was := kept.get(what, older.get(what))) != now:
                raise FormatError(f"{folder} belongs to another run: its {what} is {was!r}, "
                                  f"this run's is {now!r}")
        tensors = safe.load_file(folder / "adapter_model.safetensors")
        put(self.tuned, tensors, str(folder))
        file = folder / "buffers.safetensors"
        if file.exists():
            own = _buffers(self.tuned.model)
            for name, value in safe.load_file(file).items():
                own[name].copy_(value)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        kept = state.load_tree(Path(checkpoint), "loop")
        optimizer = self.tuned.current_optimizer
        asked = [{k: g[k] for k in _ASKED if k in g} for g in optimizer.param_groups]
        state.load_optimizer_state(optimizer, self._named(),
                                   state.load_tree(Path(checkpoint), "optimizer"))
        for group, now in zip(optimizer.param_groups, asked, strict=True):
            group.update(now)                   # what this run was asked for, not the one before
        go_on_by(self.lr_scheduler, kept["scheduler"])
        self.tuned.timeline.load(kept["timeline"])
        self._resumed = (kept["losses"], is_owed(Path(checkpoint)))
        self._earlier = float(kept.get("seconds", 0.0))

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters: a schedule may have frozen some for now, and they keep their state."""
        return list(self.tuned.model.named_parameters())

    def _load_scaler(self, checkpoint: str | None) -> None:
        kept = state.load_tree(Path(checkpoint), "loop")["scaler"] if checkpoint else None
        if kept is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            kept = state.load_tree(Path(checkpoint), "loop")
            state.go_on_drawing(Path(checkpoint), self.args.process_index, kept["processes"],
                                self.args.world_size, self.args.seed + self.step)

    def go_on(self) -> None:
        """Running sums as they were, and the evaluation that a killed run still owed."""
        if self._resumed is None:
            return
        (loss, total, logged), owed = self._resumed
        self._resumed = None
        self._tr_loss += loss
        self._total_loss_scalar, self._globalstep_last_logged = total, logged
        if owed:
            self._determine_best_metric(self._evaluate(None, None), None)
            self._evaluated()

    def _run_epoch(self, *args: Any, **kw: Any) -> None:
        """A run killed after its last step has nothing more to do (the base would go on)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kw)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        if bad := checkpoint.changed(folder):
            raise FormatError(f"{folder / bad} is not what was saved: its SHA-256 differs")
        put(self.tuned, safe.load_file(folder / "adapter_model.safetensors"), str(folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save or self.tuned.state.shards is not None:
            self.tuned.save(Path(output_dir or self.args.output_dir))


class GoOn(transformers.TrainerCallback):
    """First thing in a resumed run: what the checkpoint was still owed."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if self.trainer is not None:
            self.trainer.tuned.total_steps = state.max_steps
            self.trainer.go_on()


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own persistent buffers (running statistics), without the recipe's."""
    names = set(model.state_dict())
    return {n: b for n, b in model.named_buffers() if n in names and ".burnish." not in f".{n}"}
