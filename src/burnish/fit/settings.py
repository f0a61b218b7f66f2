"""What a run is told, as transformers' arguments and as words for the recipe's optimizer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import ConfigError, nearest
from ..core.recipe import Recipe
from ..core.stage import Stage
from ..engine.tuned import Tuned
from .arguments import Options
from .data import Data
from .order import BY_LENGTH, by_length
from .packs import packable
from .secret import secret_of

#: figures of which less is better
LESS = ("loss", "perplexity", "mae", "wer", "cer")


def learning_rate(tuned: Tuned) -> float:
    """The default: see :func:`fit`."""
    return usual_rate(sum(p.numel() for p in tuned.parameters()),
                      sum(p.numel() for p in tuned.model.parameters()), tuned.recipe)


def usual_rate(trained: int, total: int, recipe: Recipe) -> float:
    """The default where so many of all numbers train."""
    rate = 1e-3 if trained < 0.1 * total else 1e-4
    return rate / 100 if any(getattr(m.optimizer(), "rates_probes", False) for m in recipe
                             if "optimizer" in m.axes()) else rate


def training_arguments(tuned: Tuned | None, found: Data, output: Path, own: Options,
                       args: Mapping[str, Any], stage: Stage | None = None
                       ) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """(hyperparameters for the recipe's optimizer, transformers' arguments, checkpoints kept).

    Without `tuned`, when there is none yet, what depends on it is a stand-in. What a stage says of
    its optimizer stands over what the run says.
    """
    from .tasks import TASKS, smooths

    args, kind = dict(args), TASKS[found.task]
    smooths(found.task, args.get("label_smoothing_factor", 0.0))
    if stage is not None and "lr" in stage.optimizer:
        args["learning_rate"] = stage.optimizer["lr"]
    keep = args.pop("save_total_limit", 2)
    hyper = {k: args.pop(k) for k in ("weight_decay",) if k in args}
    if "adam_beta1" in args or "adam_beta2" in args:
        hyper["betas"] = (args.pop("adam_beta1", 0.9), args.pop("adam_beta2", 0.999))
    if "adam_epsilon" in args:
        hyper["eps"] = args.pop("adam_epsilon")
    if stage is not None:
        hyper |= {k: v for k, v in stage.optimizer.items() if k != "lr"}
    strategy = "steps" if args.get("max_steps", 0) > 0 else "epoch"
    steps = max(1, args["max_steps"] // 5) if strategy == "steps" else None
    evaluates = found.validation is not None
    defaults: dict[str, Any] = {
        "output_dir": str(output), "learning_rate": learning_rate(tuned) if tuned else 1e-3,
        "warmup_steps": 0.05,
        "logging_steps": 0.01, "save_strategy": strategy, "report_to": [],
        "eval_strategy": strategy if evaluates else "no", "seed": 42, "disable_tqdm": True,
        "per_device_eval_batch_size": args["per_device_train_batch_size"],
        "dataloader_pin_memory": torch.cuda.is_available(), "label_names": list(kind.truth),
        "logging_nan_inf_filter": False, "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),  # else several processes stay strangers
    }
    if steps is not None and "save_steps" not in args:
        defaults["save_steps"] = steps
    if steps is not None and "eval_steps" not in args:
        defaults["eval_steps"] = args.get("save_steps", steps)
    settings = defaults | args
    if own.group_by_length:
        settings["train_sampling_strategy"] = BY_LENGTH
    if own.tensorboard:
        settings["report_to"] = ["tensorboard"]
    if not evaluates and settings["eval_strategy"] != "no":
        raise ConfigError("there is no validation split to evaluate on; give one, or validation=")
    together = settings["eval_strategy"] == settings["save_strategy"] != "no" and (
        settings["save_strategy"] == "epoch" or
        settings.get("save_steps", 500) == settings.get("eval_steps", settings.get("save_steps")))
    if evaluates and together:
        settings.setdefault("load_best_model_at_end", True)
        by = settings.setdefault("metric_for_best_model", kind.metric)
        settings.setdefault("greater_is_better", str(by).removeprefix("eval_") not in LESS)
    if own.early_stopping_patience is not None and not settings.get("load_best_model_at_end"):
        raise ConfigError(
            f"early_stopping_patience={own.early_stopping_patience} ends a run by the figures of "
            "its evaluations and keeps the best: give a validation split, evaluate and save at the "
            "same steps, and leave load_best_model_at_end on")
    if tuned is not None and (any(sentence(tuned)) or secret_of(tuned.recipe)):
        settings.setdefault("max_grad_norm", 0.0)  # no gradient, a second backward, a private sum
    return hyper, settings, keep


def check_values(found: Mapping[str, Data], output: Path, own: Options, args: Mapping[str, Any],
                 recipe: Any, model: Any) -> None:
    """Raises ConfigError for settings that cannot stand with these data and this recipe, before a
    model is loaded. found: the data sets by their names."""
    import transformers

    for one in found.values():
        with transformers_errors():
            transformers.TrainingArguments(**training_arguments(None, one, output, own, args)[1])
    first = next(iter(found.values()))
    packable(own, args, recipe, first, model)
    by_length(first.task, own.group_by_length, recipe)


def sentence(tuned: Tuned) -> tuple[bool, bool]:
    """(zeroth order?, steps inside backward?) of the recipe's optimizer, without making it."""
    return optimises(tuned.recipe)


def optimises(recipe: Recipe) -> tuple[bool, bool]:
    """As :func:`sentence`, of a recipe."""
    from ..blocks.update.step import InBackward
    from ..blocks.update.zeroth import ZerothOrder

    answers = [m.optimizer() for m in recipe if "optimizer" in m.axes()]
    return (any(isinstance(a, ZerothOrder) for a in answers),
            any(isinstance(a, InBackward) or getattr(a, "in_backward", False) for a in answers))


@contextlib.contextmanager
def transformers_errors() -> Iterator[None]:
    """A refusal of transformers as ours; of a name that is none of several, with the nearest."""
    try:
        yield
    except (ValueError, TypeError) as e:
        said = str(e).splitlines()[0]
        choice = re.match(r"(\S+) is not a valid (\w+), please select one of \[(.*)\]", said)
        if choice is None:
            raise ConfigError(f"training arguments: {said}") from None
        word, kind = choice[1], choice[2]
        known = re.findall(r"'([^']*)'", choice[3])
        near = nearest(word, known).removeprefix("; ")
        raise ConfigError(f"{_CHOICES.get(kind, 'training arguments')}: there is no {word!r}; "
                          f"{near or 'expected one of ' + ', '.join(known)}") from None


#: what transformers calls the choices of a setting, where one setting alone has them
_CHOICES = {"SchedulerType": "lr_scheduler_type", "SaveStrategy": "save_strategy",
            "HubStrategy": "hub_strategy"}


def transformers_arguments(settings: Mapping[str, Any]) -> Any:
    import transformers

    return transformers.TrainingArguments(**settings)
