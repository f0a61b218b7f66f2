"""``burnish.fit(model, data, ...)``: from a name, a file and a memory to a finished adapter."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.batches import moved
from ..core.errors import CheckError, ConfigError
from ..core.keys import Read, keys_of
from ..core.recipe import parse
from ..engine.tune import tune
from ..engine.tuned import DEFAULT, Tuned
from ..formats import claim, safe, staged, written
from ..formats.model_files import PROCESSOR
from ..formats.warm import begin
from ..memory import MemoryReport, parse_bytes, process_peak, steady_heap
from ..memory.allocator import reset_peak, resident
from ..memory.usual import CHUNKED, usual
from . import checkpoint
from .arguments import Options, recipe_of, sort_out
from .data import Data, read, there
from .heads import drawn
from .moments import Moments, longest
from .order import by_class
from .packs import exact
from .pipelines import usual_task
from .places import check_local, check_served, suited
from .processes import alone, sayer, settle, spread
from .promise import (
    as_trained,
    choose,
    held_out,
    memory_line,
    out_of_memory,
    promised,
    stores,
    workers_told,
)
from .secret import drawn_by, rows_read
from .settings import (
    check_values,
    sentence,
    training_arguments,
    transformers_arguments,
    transformers_errors,
)
from .stages import check_tasks, idle, left_by, plan, tasks_of, told
from .starting import refuse_earlier, starting_point
from .tasks import TASKS, Task, by_itself, embedded, task_for

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
    data: what :func:`burnish.fit.data.read` reads: "digits", a file or folder, a hub name. Several
        by name, ``{"first": ..., "second": ...}``, are tasks for a recipe that trains in stages
        (``lora(rank=8) + o_lora``); ``max_steps`` is then of all together, divided by their rows.
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
    settle(own)
    own.numbers(model)
    recipe = recipe_of(recipe, lora)
    tasks = tasks_of(data)
    check_tasks(tasks, None if recipe is None else parse(recipe))
    if memory is not None:
        parse_bytes(memory)
    if not isinstance(model, nn.Module):
        check_local(str(model))
    for one in tasks.values():
        there(one)
    output = Path(output)
    with claimed(output, model, tasks.values(), own.processor):
        refuse_earlier(output, own)
        return _fit(model, tasks, recipe, memory, output, own, args)


#: what a run writes beside its checkpoints, and files that make a folder somebody's model
WRITES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "run.json",
          "metrics.jsonl", "report.html", "answers.jsonl", *PROCESSOR, "config.json",
          "model.safetensors*")


@contextlib.contextmanager
def claimed(output: Path, model: Any, data: Iterable[Any], processor: Any = None
            ) -> Iterator[None]:
    """The output is this run's alone until it ends; raises ConfigError beforehand when it is (in)
    an input, holds files of the run's names that are not ours, or another run is writing there.
    """
    named = getattr(model, "name_or_path", None) if isinstance(model, nn.Module) else model
    claim.refuse_overlap(output, [("the model", named), ("the processor", processor),
                                  *(("the data", one) for one in data)])
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; name a folder for the output")
    claim.refuse_foreign(output, WRITES, "adapter")
    checkpoint.refuse_foreign(output)
    if int(os.environ.get("RANK", "0")):      # the first process of a run holds it for all
        yield
        return
    with claim.lock(output):
        yield


def _fit(model: str | Path | nn.Module, data: dict[str, Any], recipe: Any, memory: Any,
         output: Path, own: Options, args: dict[str, Any]) -> Run:
    steady_heap()
    import transformers

    from .driving import quiet_libraries

    quiet_libraries()
    say = sayer(own.quiet)
    if note := alone():
        say(f"note: {note}")
    named = model if isinstance(model, nn.Module) else str(model)
    keys = keys_of(parse(recipe)) if recipe is not None else {}
    given = TASKS[own.task].gives if own.task in TASKS else ()
    found = _read(data, named, own, int(args.get("seed", 42)),
                  {k: r for k, r in keys.items() if k not in given}, say)
    size = int(args.setdefault("per_device_train_batch_size", 16))
    first = next(iter(found.values()))
    by_itself(first.task, recipe, memory, own.shots)
    check_values(found, output, own, args, recipe, named)
    part = embedded(first.task, recipe)
    if TASKS[first.task].by_class:
        by_class(own.per_class, size)
    check_served(first.task, named, own.trust_remote_code)
    task = task_for(first, named, processor=own.processor, max_length=own.max_length,
                    trust_remote_code=own.trust_remote_code, seed=int(args.get("seed", 42)),
                    **own.of_task())
    task.folder = output
    if part is not None:
        task.taught_by(part, next((keys[k] for k in task.gives if k in keys), None))
    torch.manual_seed(int(args.get("seed", 42)))  # a new head is drawn
    moments = Moments(own.measure)
    if isinstance(named, str):
        with moments.reading():
            module = task.load(named, own.trust_remote_code, stores(recipe),
                               **own.numbers(named))
        name = named
        moments.will_read(task.files(named), module)
        task.notes += drawn(module, task.fresh, own.head)
    else:
        module = task.fit_head(named)
        task.settle(module)
        name = getattr(named, "name_or_path", "") or type(named).__name__

    plain = not isinstance(module, transformers.PreTrainedModel)
    if plain and keys:
        raise ConfigError(f"{recipe} reads {', '.join(keys)} of the batch, which fit hands to "
                          "models of transformers; train this one with tuned.step")
    module.train()  # dropout keeps masks and chooses kernels: promised as it will run
    tasks = {n: task if one is first else task.on(one, module) for n, one in found.items()}
    examples = {n: t.call(t.example(size), plain)[0] for n, t in tasks.items()}
    loss = task.call(task.example(1), plain)[1]
    for t in tasks.values():
        t.check(module)
        for sample in t.preview():
            say(textwrap.indent(sample, "  "))
        for note in t.notes:
            say(f"note: {note}")
    batches = {n: b for n, b in examples.items() if n}
    batch = next(iter(examples.values()))
    times = int(args.get("gradient_accumulation_steps", 1))
    with as_trained(module, args):
        if recipe is None and memory is not None:
            best = choose(module, memory, batch, loss, own, say, times)
            recipe, promise = best.recipe, best.report
            if best.batch != size:
                size = args["per_device_train_batch_size"] = best.batch
                args["gradient_accumulation_steps"] = best.accumulate
                examples = {"": task.call(task.example(size), plain)[0]}
        else:
            recipe, promise, why = usual(module).run(
                DEFAULT_RECIPE if recipe is None else recipe,
                lambda r: promised(module, r, memory, batch, loss, own, say, batches, times,
                                   held_out(r, task, size, plain)))
            if why:
                say(f"note: {CHUNKED} is left out: {why}")
        looked_at = longest(tasks, int(args.get("per_device_eval_batch_size", size)), own.test,
                            plain)
        if promise is not None:
            moments.will_run(module, recipe, promise, next(iter(examples.values())), looked_at, own,
                             memory, say, batches)

    def calibration(of: Task) -> Iterator[Any]:
        return rows_read(_calibration(of, size, plain), recipe)

    with moments.watched("load", module):
        tuned = tune(module, recipe, targets=own.targets, head=own.head, name=next(
            iter(batches), DEFAULT), calibration=calibration(task), seed=int(args.get("seed", 42)))
    say(repr(tuned))
    begin(tuned, own.init_from, say)
    for of in tasks.values():
        of.begun(own.init_from)
    with tuned.cached(0):                        # between two steps nothing was promised to that
        return _train(tuned, tasks, name, promise, (examples, loss), calibration, output, own,
                      args, say, (moments, looked_at))


# -- before ------------------------------------------------------------------------------------
def _read(data: dict[str, Any], model: str | nn.Module, own: Options, seed: int,
          keys: Mapping[str, Read], say: Any) -> dict[str, Data]:
    """Every data set; those after the first are of its task, with its classes."""
    found: dict[str, Data] = {}
    made = usual_task(model)
    for name, where in data.items():
        first = next(iter(found.values()), None)
        one = read(where, task=own.task or made, text=own.text, label=own.label, image=own.image,
                   audio=own.audio, prompt=own.prompt, completion=own.completion,
                   split=own.split, validation=own.validation, seed=seed, keys=keys,
                   labels=first.labels if first else None, group=own.group)
        one = suited(one, model, own.trust_remote_code)
        if first is not None and one.task != first.task:
            raise ConfigError(f"{name} is {one.task} and {next(iter(found))} {first.task}: tasks "
                              "one after the other share the model's head; give task=")
        say(f"{name}: {one}" if name else str(one))
        found[name] = one
    return found


def _calibration(task: Task, size: int, plain: bool) -> Iterator[Any]:
    """Training batches in a fixed order, for methods that read data first."""
    rows = task.rows("train")
    for start in range(0, len(rows), size):
        batch = task.collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        yield task.call(batch, plain)[0]


# -- the run -------------------------------------------------------------------------------------
def _train(tuned: Tuned, tasks: dict[str, Task], name: str, promise: MemoryReport | None,
           example: tuple[dict[str, Any], Any], calibration: Any, output: Path, own: Options,
           args: dict[str, Any], say: Any, looked: tuple[Moments, tuple[Task, Any] | None]) -> Run:
    from .loop import GoOn, Trainer
    from .shown import Answers
    from .watch import Bar, Metrics, Stop

    moments, looked_at = looked
    legs = plan(tuned, tasks, _arguments(tuned, tasks, output, own, args), args)
    for leg in legs if len(legs) > 1 else ():
        say(f"stage {leg.name}: {leg.steps} updates on {leg.task.data.source}")
    if note := idle(tuned, tasks):
        say(f"note: {note}")
    with _arguments(tuned, tasks, output, own, args).main_process_first():
        start = starting_point(output, own, say)    # the first cleans up, others find it clean
    number, past = left_by(start, legs)
    stop, trainer, settings = Stop(), None, {}
    prints = [(n, t.data.fingerprint()) for n, t in tasks.items()]
    fingerprint = prints[0][1] if len(prints) == 1 else ", ".join(f"{n} {f}" for n, f in prints)
    reset_peak()
    peak = before = resident()
    for leg in legs[:number]:                       # over: who was there, and what then happened
        leg.begin(tuned, calibration)
        leg.end(tuned)
    with stop.listening(), out_of_memory(output), workers_told(output):
        for leg in legs[number:]:
            if trainer is not None:
                trainer.let_go()
            leg.begin(tuned, calibration)
            spread(tuned, own)
            tuned.sampling = drawn_by(tuned.recipe, len(leg.task.rows("train")), args)
            hyper, settings, keep = training_arguments(tuned, leg.task.data, output, own,
                                                       leg.arguments(args), leg.stage)
            with transformers_errors():
                arguments = transformers_arguments(settings)
            if arguments.gradient_accumulation_steps > 1:
                hyper["accumulation"] = arguments.gradient_accumulation_steps
            if any(sentence(tuned)):                 # other gradients are the trainer's to clip
                hyper["max_grad_norm"] = arguments.max_grad_norm
            here = start if leg.number == number else None
            at = checkpoint.step_of(here) if here else leg.before or None
            go_on, task = GoOn(), leg.task
            watchers = [go_on, Metrics(output / "metrics.jsonl", at, leg),
                        Bar(promise.peak_bytes if promise else None, own.quiet, leg), stop,
                        *own.watchers]
            if own.samples:
                watchers.insert(2, Answers(output / "answers.jsonl", at, leg, tuned, task,
                                           own.samples))
            trainer = Trainer(
                tuned, task, arguments, keep=keep, hyper=hyper, fingerprint=fingerprint, leg=leg,
                past=past, stages=told(legs), moments=moments, callbacks=watchers,
                train_dataset=task.rows("train"),
                eval_dataset=task.rows("validation") if task.data.validation is not None else None)
            go_on.trainer = trainer
            tuned.total_steps = total_steps(trainer)
            with trainer.accelerator.autocast():
                task.ready(tuned, trainer.args.device, arguments.per_device_eval_batch_size)
                if own.packing:
                    exact(tuned, task, arguments.per_device_train_batch_size, trainer.args.device)
            trainer.train(resume_from_checkpoint=str(here) if here else None)
            peak = max(peak, process_peak())
            if stop.asked is not None:
                raise KeyboardInterrupt(
                    f"stopped after step {trainer.step}; go on with resume=True "
                    f"(checkpoint-{trainer.step} in {output} is whole)")
            past = trainer.over()
            dearest = promise.stage if promise and promise.stage else legs[-1].name
            if own.measure and leg.name == dearest:
                past.truth = _measure(tuned, example, tasks, task, trainer).to_dict()
            leg.end(tuned)
    assert trainer is not None
    metrics, logged = {}, len(trainer.state.log_history)
    for n, task in tasks.items():
        trainer.look_at(task)
        for split in task.data.splits:
            if split == "train" or (split == "test" and own.test is False):
                continue
            prefix = f"{n}_{split}" if n else split
            shown = trainer.evaluate(task.rows(split), metric_key_prefix=prefix)
            metrics[f"{n} {split}" if n else split] = figures(shown, prefix)
    truth = MemoryReport.from_dict(past.truth) if past.truth and own.measure else None
    if truth is not None:
        moments.was("train", truth)
    if looked_at is not None:
        moments.evaluates(tuned, looked_at[0], moved(looked_at[1], trainer.args.device))
    from .report import facts_of

    facts = facts_of(tuned, tasks, name, metrics, promise, truth, trainer, past,
                     process=(before, peak), settings=settings, moments=moments)
    history = [*past.history, *trainer.state.log_history[logged:]]
    run = Run(output, tuned, metrics, promise, truth, history, facts)
    if trainer.args.should_save:
        finish(run, task, own, moments)
        say(str(run))
    elif tuned.state.shards is not None:        # all give their parts, to be written and read again
        tuned.save(output)
        written.contents(tuned)
    return run


def _arguments(tuned: Tuned, tasks: dict[str, Task], output: Path, own: Options,
               args: dict[str, Any]) -> Any:
    """transformers' arguments of the run as a whole."""
    data = next(iter(tasks.values())).data
    with transformers_errors():
        return transformers_arguments(training_arguments(tuned, data, output, own, args)[1])


def _measure(tuned: Tuned, example: tuple[dict[str, Any], Any], tasks: dict[str, Task], task: Task,
             trainer: Any) -> MemoryReport:
    """The truth of a step as it was promised: of the stage that has just ended."""
    from ..memory import measure

    wrapped = trainer.model_wrapped
    through = wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else None
    batch = next(example[0][n] for n, t in tasks.items() if t is task)
    tuned.model.train()
    truth = measure(tuned, moved(batch, trainer.args.device), example[1], through=through,
                    accumulation=trainer.args.gradient_accumulation_steps,
                    held=moved(held_out(tuned.recipe, task, trainer.args.train_batch_size,
                                        trainer.plain), trainer.args.device))
    tuned.model.eval()
    return truth


def total_steps(trainer: Any) -> int:
    """Updates in the whole run, which schedules of a recipe count by."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])


def finish(run: Run, task: Task, own: Options, moments: Moments) -> None:
    """The finished folder: adapter, card, processor, run.json, report.html."""
    from .card import card
    from .report import write_report

    with staged.update(run.folder, "adapter", WRITES[:6]) as new:
        with moments.watched("save", run.tuned.model, run.tuned):
            run.tuned.save(new, run=run.facts, card=card(run.facts))
        moments.merges(run.tuned)
        run.facts["memory"]["moments"] = moments.to_dict()
        safe.write_json(new / "run.json", run.facts)
        reread(run.tuned, new)
        if hasattr(task.processor, "save_pretrained"):
            task.processor.save_pretrained(new)
        if own.report:
            page = write_report(run.facts, run.history, run.tuned, data=task.data)
            safe.write_text(new / "report.html", page)


def reread(tuned: Tuned, folder: Path) -> None:
    """What was written is what was trained, bit for bit; raises CheckError otherwise."""
    kept = safe.Tensors(folder / "adapter_model.safetensors")      # one at a time
    for name, value in written.contents(tuned).items():
        found = kept.get(name)
        if found is None or not torch.equal(found, value.cpu()):
            raise CheckError(f"{folder}: {name} was not written as it was trained")


def figures(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Without the prefix, and without the timings that come along."""
    skip = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {k.removeprefix(f"{prefix}_"): float(v) for k, v in metrics.items()
            if k.startswith(f"{prefix}_") and not k.endswith(skip)}
