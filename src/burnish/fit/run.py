"""``burnish.fit(model, data, ...)``: from a name, a file and a memory to a finished adapter."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import CheckError, ConfigError
from ..core.recipe import parse
from ..engine.tune import tune
from ..engine.tuned import Tuned
from ..formats import claim, safe, staged
from ..formats.model_files import PROCESSOR
from ..memory import MemoryReport, parse_bytes, process_peak, steady_heap
from ..memory.allocator import reset_peak, resident
from . import checkpoint
from .arguments import Options, recipe_of, sort_out
from .data import Data, read, there
from .heads import drawn
from .places import check_local, check_served
from .processes import alone
from .promise import (
    choose,
    evaluation,
    memory_line,
    out_of_memory,
    promised,
    workers_told,
)
from .tasks import Task, task_for

#: what trains when neither a recipe nor a memory is given: small, exact to merge, loads elsewhere
DEFAULT_RECIPE = "lora(rank=8)"

@dataclass
class Run:
    """A finished run. `tuned` is the model with what was learnt (the best by validation).

    metrics: figures per split.  promise, truth: memory simulated before and measured after.
    history: every log of the loop.  facts: what `run.json` holds.
    """

    folder: Path
    tuned: Tuned
    metrics: dict[str, dict[str, float]]
    promise: MemoryReport | None
    truth: MemoryReport | None
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)
    facts: dict[str, Any] = field(repr=False, default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), **self.facts}

    def __str__(self) -> str:
        lines = [f"{k}: {', '.join(f'{n} {v:.4g}' for n, v in m.items())}"
                 for k, m in self.metrics.items()]
        lines.append(memory_line(self.facts.get("memory", {})))
        return "\n".join([*lines, f"written to {self.folder}"])


def fit(model: str | Path | nn.Module, data: Any, recipe: Any = None, memory: Any = None,
        output: str | Path = "out/", **training: Any) -> Run:
    """Fine-tune `model` on `data` within the memory you have.

    model: a module (changed in place), a local folder, or a hub name.
    data: what :func:`burnish.fit.data.read` reads: "digits", a file or folder, a hub name.
    recipe: an expression such as ``"nf4 + snella(rank=8)"``. None: the best that fits `memory`
        (by :func:`burnish.plan`); ``"lora(rank=8)"`` when no memory is given either.
    memory: bytes or text such as "8GB". With a recipe, a promise above it is refused.
    output: the folder for checkpoints, the adapter, metrics.jsonl, run.json and report.html.
    training: names of transformers' TrainingArguments, the aliases people know from elsewhere
        (lr, epochs, batch_size, max_length...), and those of
        :class:`burnish.fit.arguments.Options`. Without ``learning_rate``: 1e-3 where less than a
        tenth of the parameters train, else 1e-4; a hundredth of that for zeroth-order recipes.
        ``resume=True`` goes on, bit for bit, from the newest whole checkpoint in `output`.

    Raises ConfigError, DataError, RecipeError (before anything is loaded, where possible),
    NoPlanError, CheckError when something does not train, MemoryExceeded, and BurnishError when
    the loss is not finite (the last good state is kept). Ctrl-C and SIGTERM end the run after the
    current step with a checkpoint, as KeyboardInterrupt.
    """
    own, args, lora = sort_out(training)
    recipe = recipe_of(recipe, lora)
    if recipe is not None:
        parse(recipe)
    if memory is not None:
        parse_bytes(memory)
    if not isinstance(model, nn.Module):
        check_local(str(model))
    there(data)
    output = Path(output)
    with claimed(output, model, data, own.processor):
        refuse_earlier(output, own)
        return _fit(model, data, recipe, memory, output, own, args)


#: what a run writes beside its checkpoints, and files that make a folder somebody's model
WRITES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "run.json",
          "metrics.jsonl", "report.html", *PROCESSOR, "config.json", "model.safetensors*")


@contextlib.contextmanager
def claimed(output: Path, model: Any, data: Any, processor: Any = None) -> Iterator[None]:
    """The output is this run's alone until it ends; raises ConfigError beforehand when it is (in)
    an input, holds files of the run's names that are not ours, or another run is writing there.
    """
    named = getattr(model, "name_or_path", None) if isinstance(model, nn.Module) else model
    claim.refuse_overlap(output, [("the model", named), ("the data", data),
                                  ("the processor", processor)])
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder for the output")
    claim.refuse_foreign(output, WRITES, "adapter")
    checkpoint.refuse_foreign(output)
    if int(os.environ.get("RANK", "0")):      # the first process of a run holds it for all
        yield
        return
    with claim.lock(output):
        yield


def _fit(model: str | Path | nn.Module, data: Any, recipe: Any, memory: Any, output: Path,
         own: Options, args: dict[str, Any]) -> Run:
    steady_heap()
    import transformers

    from .loop import quiet_libraries

    quiet_libraries()
    say = _say(own.quiet)
    if note := alone():
        say(f"note: {note}")
    named = model if isinstance(model, nn.Module) else str(model)
    found = read(data, task=own.task, text=own.text, label=own.label, image=own.image,
                 prompt=own.prompt, completion=own.completion, split=own.split,
                 validation=own.validation, seed=int(args.get("seed", 42)))
    say(str(found))
    size = int(args.setdefault("per_device_train_batch_size", 16))
    with _transformers_errors():                # values, before a model is loaded
        transformers.TrainingArguments(**training_arguments(None, found, output, own, args)[1])
    check_served(found.task, named, own.trust_remote_code)
    task = task_for(found, named, processor=own.processor, max_length=own.max_length,
                    trust_remote_code=own.trust_remote_code)
    torch.manual_seed(int(args.get("seed", 42)))  # a new head is drawn
    if isinstance(named, str):
        kw = {"dtype": own.dtype} if own.dtype is not None else {}
        module, name = task.load(named, own.trust_remote_code, **kw), named
        task.notes += drawn(module, task.fresh, own.head)
    else:
        module = task.fit_head(named)
        task.settle(module)
        name = getattr(named, "name_or_path", "") or type(named).__name__

    plain = not isinstance(module, transformers.PreTrainedModel)
    module.train()  # dropout keeps masks and chooses kernels: promised as it will run
    batch, loss = task.call(task.example(size), plain)
    task.check(module)
    for sample in task.preview():
        say(textwrap.indent(sample, "  "))
    for note in task.notes:
        say(f"note: {note}")
    if recipe is None and memory is not None:
        best = choose(module, memory, batch, loss, own, say)
        recipe, promise = best.recipe, best.report
        if best.batch != size:
            size = args["per_device_train_batch_size"] = best.batch
            args["gradient_accumulation_steps"] = \
                best.accumulate * int(args.get("gradient_accumulation_steps", 1))
            batch, loss = task.call(task.example(size), plain)
    else:
        recipe = DEFAULT_RECIPE if recipe is None else recipe
        promise = promised(module, recipe, memory, batch, loss, own, say)

    if promise is not None and not plain and found.validation is not None:
        looked_at = task.example(int(args.get("per_device_eval_batch_size", size)), "validation")
        if _entries(looked_at) > _entries(batch):       # else the training step is the higher peak
            evaluation(module, recipe, promise, memory, looked_at, own, say)

    tuned = tune(module, recipe, targets=own.targets, head=own.head,
                 calibration=_calibration(task, size, plain), seed=int(args.get("seed", 42)))
    say(repr(tuned))
    return _train(tuned, task, name, promise, (batch, loss), output, own, args, say)


# -- before ------------------------------------------------------------------------------------
def _calibration(task: Task, size: int, plain: bool) -> Iterator[Any]:
    """Training batches in a fixed order, for methods that read data first."""
    rows = task.rows("train")
    for start in range(0, len(rows), size):
        batch = task.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        yield task.call(batch, plain)[0]


def learning_rate(tuned: Tuned) -> float:
    """The default: see :func:`fit`."""
    total = sum(p.numel() for p in tuned.model.parameters())
    trained = sum(p.numel() for p in tuned.parameters())
    rate = 1e-3 if trained < 0.1 * total else 1e-4
    return rate / 100 if sentence(tuned)[0] else rate


# -- the run -------------------------------------------------------------------------------------
def _train(tuned: Tuned, task: Task, name: str, promise: MemoryReport | None,
           example: tuple[Any, Any], output: Path, own: Options, args: dict[str, Any],
           say: Any) -> Run:
    import transformers

    from .loop import GoOn, Trainer
    from .watch import Bar, Metrics, Stop

    found = task.data
    hyper, settings, keep = training_arguments(tuned, found, output, own, args)
    with _transformers_errors():
        arguments = transformers.TrainingArguments(**settings)
    if arguments.gradient_accumulation_steps > 1:
        hyper["accumulation"] = arguments.gradient_accumulation_steps
    hyper["max_grad_norm"] = arguments.max_grad_norm

    with arguments.main_process_first():  # the first cleans up, the others find it clean
        start = starting_point(output, own, say)
    stop, go_on = Stop(), GoOn()
    at = checkpoint.step_of(start) if start else None
    watchers = [go_on, Metrics(output / "metrics.jsonl", at),
                Bar(promise.peak_bytes if promise else None, own.quiet), stop, *own.callbacks]
    trainer = Trainer(
        tuned, task, arguments, keep=keep, hyper=hyper, fingerprint=found.fingerprint(),
        train_dataset=task.rows("train"),
        eval_dataset=task.rows("validation") if found.validation is not None else None,
        callbacks=watchers)
    go_on.trainer = trainer
    tuned.total_steps = total_steps(trainer)

    reset_peak()
    before = resident()
    with stop.listening(), out_of_memory(output), workers_told(output):
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    seconds = trainer.seconds()
    peak = max(before, process_peak())
    if stop.asked is not None:
        step = trainer.state.global_step
        raise KeyboardInterrupt(f"stopped after step {step}; go on with resume=True "
                                f"(checkpoint-{step} in {output} is whole)")
    metrics = {}
    for split in found.splits:
        if split == "train" or (split == "test" and own.test is False):
            continue
        shown = trainer.evaluate(task.rows(split), metric_key_prefix=split)
        metrics[split] = figures(shown, split)
    truth = None
    if own.measure:
        from ..memory import measure

        batch, loss = example
        batch = _to_device(batch, trainer.args.device)
        tuned.model.train()
        truth = measure(tuned, batch, loss)
        tuned.model.eval()
    from .report import facts_of

    facts = facts_of(tuned, task, name, metrics, promise, truth, trainer, seconds=seconds,
                     process=(before, peak), settings=settings)
    run = Run(output, tuned, metrics, promise, truth, list(trainer.state.log_history), facts)
    if trainer.args.should_save:
        finish(run, task, own)
        say(str(run))
    return run


def starting_point(output: Path, own: Options, say: Any) -> Path | None:
    """The checkpoint to go on from, or None for the beginning, with the folder made fit for it."""
    for n in checkpoint.clear_leftovers(output):
        say(f"removed {n}, which an interrupted run left unfinished")
    start = checkpoint.find(output, own.resume)
    if start is not None:
        say(f"going on from {start}")
        return start
    if own.resume:
        say(f"no checkpoint in {output} to go on from: starting at the beginning")
    for folder in checkpoint.all_in(output):
        checkpoint.remove(folder)
    return None


def refuse_earlier(output: Path, own: Options) -> None:
    """Another run's checkpoints stay what they are, unless somebody says otherwise."""
    earlier = checkpoint.all_in(output)
    if earlier and not own.overwrite and checkpoint.find(output, own.resume) is None:
        raise ConfigError(f"{output} holds checkpoints of an earlier run; resume=True goes on from "
                          f"{earlier[-1].name}, overwrite=True removes them and starts afresh")


def training_arguments(tuned: Tuned | None, found: Data, output: Path, own: Options,
                       args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """(hyperparameters for the recipe's optimizer, transformers' arguments, checkpoints kept).

    Without `tuned`, when there is none yet, what depends on it is a stand-in.
    """
    args = dict(args)
    keep = args.pop("save_total_limit", 2)
    hyper = {k: args.pop(k) for k in ("weight_decay",) if k in args}
    if "adam_beta1" in args or "adam_beta2" in args:
        hyper["betas"] = (args.pop("adam_beta1", 0.9), args.pop("adam_beta2", 0.999))
    if "adam_epsilon" in args:
        hyper["eps"] = args.pop("adam_epsilon")
    strategy = "steps" if args.get("max_steps", 0) > 0 else "epoch"
    steps = max(1, args["max_steps"] // 5) if strategy == "steps" else None
    evaluates = found.validation is not None
    defaults: dict[str, Any] = {
        "output_dir": str(output), "learning_rate": learning_rate(tuned) if tuned else 1e-3,
        "warmup_steps": 0.05,
        "logging_steps": 0.01, "save_strategy": strategy, "report_to": [],
        "eval_strategy": strategy if evaluates else "no", "seed": 42, "disable_tqdm": True,
        "per_device_eval_batch_size": args["per_device_train_batch_size"],
        "dataloader_pin_memory": torch.cuda.is_available(), "label_names": ["labels"],
        "logging_nan_inf_filter": False, "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),  # else several processes stay strangers
    }
    if steps is not None and "save_steps" not in args:
        defaults["save_steps"] = steps
    if steps is not None and "eval_steps" not in args:
        defaults["eval_steps"] = args.get("save_steps", steps)
    settings = defaults | args
    if own.tensorboard:
        settings["report_to"] = ["tensorboard"]
    if not evaluates and settings["eval_strategy"] != "no":
        raise ConfigError("there is no validation split to evaluate on; give one, or validation=")
    together = settings["eval_strategy"] == settings["save_strategy"] != "no" and (
        settings["save_strategy"] == "epoch" or
        settings.get("save_steps", 500) == settings.get("eval_steps", settings.get("save_steps")))
    if evaluates and together:
        from .tasks import TASKS

        kind = TASKS[found.task]
        settings.setdefault("load_best_model_at_end", True)
        settings.setdefault("metric_for_best_model", kind.metric)
        settings.setdefault("greater_is_better", kind.greater_is_better)
    if tuned is not None and sentence(tuned)[1]:
        settings.setdefault("max_grad_norm", 0.0)  # gradients never exist together
    return hyper, settings, keep


def sentence(tuned: Tuned) -> tuple[bool, bool]:
    """(zeroth order?, steps inside backward?) of the recipe's optimizer, without making it."""
    from ..blocks.update.step import InBackward
    from ..blocks.update.zeroth import ZerothOrder

    answers = [m.optimizer() for m in tuned.recipe if "optimizer" in m.axes()]
    return (any(isinstance(a, ZerothOrder) for a in answers),
            any(isinstance(a, InBackward) or getattr(a, "in_backward", False) for a in answers))


def total_steps(trainer: Any) -> int:
    """Updates in the whole run, which schedules of a recipe count by."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])


def finish(run: Run, task: Task, own: Options) -> None:
    """The finished folder: adapter, card, processor, run.json, report.html."""
    from .card import card
    from .report import write_report

    with staged.update(run.folder, "adapter", WRITES[:6]) as new:
        run.tuned.save(new, run=run.facts, card=card(run.facts))
        reread(run.tuned, new)
        if hasattr(task.processor, "save_pretrained"):
            task.processor.save_pretrained(new)
        if own.report:
            page = write_report(run.facts, run.history, run.tuned, data=task.data)
            safe.write_text(new / "report.html", page)


def reread(tuned: Tuned, folder: Path) -> None:
    """What was written is what was trained, bit for bit; raises CheckError otherwise."""
    kept = safe.load_file(folder / "adapter_model.safetensors")
    for name, value in tuned.tensors().items():
        if name not in kept or not torch.equal(kept[name], value.cpu()):
            raise CheckError(f"{folder}: {name} was not written as it was trained")


def figures(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Without the prefix, and without the timings that come along."""
    skip = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {k.removeprefix(f"{prefix}_"): float(v) for k, v in metrics.items()
            if k.startswith(f"{prefix}_") and not k.endswith(skip)}


def _entries(batch: Any) -> int:
    return max(t.numel() for t in batch.values())


# -- small things ----------------------------------------------------------------------------------
@contextlib.contextmanager
def _transformers_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as e:
        raise ConfigError(f"training arguments: {str(e).splitlines()[0]}") from None


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {k: v.to(device) for k, v in batch.items()}
    return tuple(v.to(device) for v in batch)


def _say(quiet: bool) -> Any:
    first = int(os.environ.get("RANK", "0")) == 0

    def say(text: str) -> None:
        if not quiet and first:
            print(text, flush=True, file=sys.stdout)

    return say
