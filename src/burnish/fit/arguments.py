"""Names of settings: those of transformers, the ones people know from elsewhere, and our own."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, nearest
from ..core.reading import shown

#: other spellings of transformers' names
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "warmup_ratio": "warmup_steps",
    "scheduler": "lr_scheduler_type", "lr_scheduler": "lr_scheduler_type",
    "evaluation_strategy": "eval_strategy",
    "clip": "max_grad_norm", "gradient_clipping": "max_grad_norm",
    "workers": "dataloader_num_workers",
}

#: other spellings of our own names
OWN_ALIASES = {
    "val_set_size": "validation",
    "sequence_len": "max_length", "cutoff_len": "max_length", "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "target_modules": "targets", "lora_target": "targets",
    "resume_from_checkpoint": "resume",
    "torch_dtype": "dtype", "sample_packing": "packing", "neat_packing": "packing",
    "caption_dropout_rate": "proportion_empty_prompts", "min_snr_gamma": "snr_gamma",
    "caption_column": "text",
    "text_column": "text", "label_column": "label", "image_column": "image",
    "audio_column": "audio", "audio_column_name": "audio",
    "do_reduce_labels": "reduce_labels",
    "max_length_seconds": "max_seconds", "max_duration_in_seconds": "max_seconds",
    "num_points": "points", "npoints": "points", "n_points": "points",
    "preference": "loss_type", "pref_loss": "loss_type", "pref_beta": "beta",
    "simpo_gamma": "gamma", "tokenizer": "processor", "image_processor": "processor",
    "feature_extractor": "processor",
}

#: names of transformers that have no say here, with what has
ELSEWHERE = {
    "output_dir": "the folder is output=",
    "optim": "the recipe names the optimizer, e.g. 'lora(rank=8) + adam8bit'",
    "optim_args": "the recipe names the optimizer",
    "optim_target_modules": "the recipe names the optimizer, e.g. 'galore(rank=128)'",
    "auto_find_batch_size": "memory='8GB' plans the batch beforehand",
    "train_sampling_strategy": "rows are shuffled anew in each epoch; group_by_length=True puts "
                               "those of like length together",
    "length_column_name": "lengths are those of the rows as they are read",
    "remove_unused_columns": "columns are chosen by text=, label=, image= and audio=",
    "label_names": "columns are chosen by text=, label=, image= and audio=",
    "push_to_hub": "upload the finished folder",
    "torch_compile": "compile the model before, or use the recipe",
    "deepspeed": "shard='fsdp2' shards the model",
    "fsdp": "shard='fsdp2' shards the model", "fsdp_config": "shard='fsdp2' shards the model",
    "save_only_model": "a checkpoint always holds all it takes to resume",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "do_train": "fit always trains", "do_eval": "give a validation split, or validation=0",
    "do_predict": "use burnish predict",
}


#: options that a task reads, where it has them
OF_TASK = ("loss_type", "beta", "gamma", "desirable_weight", "undesirable_weight", "pooling",
           "scale", "max_seconds", "reduce_labels", "language", "translate", "max_answer",
           "shots", "packing", "instance_prompt", "proportion_empty_prompts", "resolution",
           "guidance_scale", "num_inference_steps", "snr_gamma", "points", "dimension",
           "per_class")


@dataclass
class Options:
    """What `fit` itself takes, beside transformers' training arguments.

    task, text, label, image, audio, prompt, completion, split, validation: see
        :func:`burnish.fit.data.read`.
    loss_type, beta, gamma: of preference tuning: dpo, ipo, hinge, orpo or simpo, how hard it pulls,
        and simpo's margin (:func:`burnish.fit.tasks.preferences.preference`). Of embeddings:
        ranking, triplet, barlow or supcon, and a triplet's margin
        (:mod:`burnish.fit.tasks.embeddings`); of pictures supcon or triplet
        (:mod:`burnish.fit.tasks.image_embeddings`).
    desirable_weight, undesirable_weight: of answers marked good and bad, in the loss.
    pooling, scale: of embeddings: mean, cls or last, and what a cosine is multiplied by.
    dimension, per_class: of embeddings of pictures: how many numbers each has (default: 128), and
        how many pictures of a class stand together in a batch (default: 4, at most half of it).
    reduce_labels: number 0 of a mask is not counted, and the classes begin at 1 (default: as the
        image processor says).
    language, translate: of speech to text: which language is said, and whether it is written in
        English, for models whose prompt says so (Whisper).
    instance_prompt: of pictures by texts: the text of every picture, where they have none of their
        own. proportion_empty_prompts: how often a text is left out in training, so that guidance
        can lead away from what is drawn without one. resolution: sides of the pictures, also of
        those in which objects are found (default: as the pipeline or the model was made).
        guidance_scale, num_inference_steps: how samples are drawn (default: as the pipeline does).
        snr_gamma: min-SNR weights of the steps, none by default.
    max_answer: tokens that an evaluation lets a model write of a row (default: those of the longest
        text of the data, and a quarter of it).
    shots, group: of instruction tuning: so many examples of one task in one sequence, of which each
        answer is learnt, and the column that says which task an example is of
        (:mod:`burnish.fit.shots`).
    packing: of language modelling and instruction tuning: several rows in one sequence of
        max_length tokens, none of which sees another (:mod:`burnish.fit.packs`).
    group_by_length: batches of rows of like length, so that less of them is filled up
        (:class:`burnish.fit.order.Alike`).
    max_length: longest row in tokens.  max_seconds: how much of a sound is heard.
    points: how many are drawn of a cloud (default: 1024).
    processor: tokenizer, picture or feature extractor, instead of the model's own.
    targets, head: as for :func:`burnish.tune`.
    resume: True or "auto" for the newest whole checkpoint, or one checkpoint's folder.
    init_from: the folder of an earlier run on this base: what it has learnt, its head left out, is
        where this one begins.
    overwrite: start afresh in a folder that holds checkpoints of an earlier run, and remove them.
    tensorboard: also write TensorBoard files.
    samples: so many rows of the validation split are answered after every evaluation, in
        answers.jsonl (:mod:`burnish.fit.shown`).
    test: also evaluate the test split at the end (default: when there is one).
    quiet: print nothing.  report: write report.html.  measure: measure a step at the end.
    shard: "ddp" (what several processes do where nothing is said) or "fsdp2": each holds a share of
        the base (:func:`burnish.shard`).  shard_offload: the shares wait on the host.
    dtype: of the loaded weights; None takes what the model's config says.
    early_stopping_patience: evaluations in a row without a better figure (metric_for_best_model)
        after which a run ends; none by default.
    trust_remote_code: let code that comes with a model run.  callbacks: more of transformers' own.
    """

    task: str | None = None
    text: str | None = None
    label: str | None = None
    image: str | None = None
    audio: str | None = None
    prompt: str | None = None
    completion: str | None = None
    split: str | None = None
    validation: float | int = 0.1
    loss_type: str | None = None
    beta: float | None = None
    gamma: float | None = None
    pooling: str | None = None
    scale: float | None = None
    dimension: int | None = None
    per_class: int | None = None
    reduce_labels: bool | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    language: str | None = None
    translate: bool | None = None
    instance_prompt: str | None = None
    proportion_empty_prompts: float | None = None
    resolution: int | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    snr_gamma: float | None = None
    max_answer: int | None = None
    shots: int | None = None
    group: str | None = None
    packing: bool | None = None
    group_by_length: bool = False
    max_length: int | None = None
    max_seconds: float | None = None
    points: int | None = None
    processor: Any = None
    targets: Any = None
    head: bool | str = "auto"
    resume: bool | str = False
    init_from: str | None = None
    overwrite: bool = False
    tensorboard: bool = False
    samples: int = 0
    test: bool | None = None
    quiet: bool = False
    report: bool = True
    measure: bool = True
    shard: str | None = None
    shard_offload: bool = False
    dtype: Any = None
    trust_remote_code: bool = False
    callbacks: list[Any] = field(default_factory=list)
    early_stopping_patience: int | None = None

    @property
    def watchers(self) -> list[Any]:
        """`callbacks`, and what ends a run that gets no better."""
        import transformers

        patience = self.early_stopping_patience
        return self.callbacks if patience is None else [
            *self.callbacks, transformers.EarlyStoppingCallback(patience)]

    def of_task(self) -> dict[str, Any]:
        """What a task reads: see :attr:`burnish.fit.tasks.Task.settings`."""
        return {n: getattr(self, n) for n in OF_TASK}

    def numbers(self, model: Any) -> dict[str, Any]:
        """``dtype`` as the libraries that load `model` take it; {} where nobody has said one.

        Raises ConfigError for what is no dtype, and for a module that is of other numbers.
        """
        from ..core.dtypes import dtype_of

        wanted = dtype_of(self.dtype)
        if wanted is None:
            return {}
        if not isinstance(model, str | Path):
            found = next((p.dtype for p in model.parameters() if p.is_floating_point()), wanted)
            if found != wanted:
                raise ConfigError(f"dtype={self.dtype} is of a model that is loaded, and this one "
                                  f"is there in {found}; hand over model.to({wanted})")
        return {"dtype": wanted}


def sort_out(training: Mapping[str, Any]) -> tuple[Options, dict[str, Any], dict[str, Any]]:
    """(own options, transformers' arguments, LoRA's old flags) of keyword arguments.

    Raises ConfigError for an unknown name (with the nearest), for one given twice under two
    spellings, and for one that is decided elsewhere (with where).
    """
    theirs = training_names()
    kinds = {**training_kinds(), **{f.name: str(f.type) for f in fields(Options)}}
    ours = {f.name for f in fields(Options)}
    own: dict[str, Any] = {}
    args: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for key, value in training.items():
        if key in _LORA:
            lora[_LORA[key]] = value
            continue
        if key in ELSEWHERE:
            raise ConfigError(f"{key}= is not a setting of fit: {ELSEWHERE[key]}")
        name = OWN_ALIASES.get(key, ALIASES.get(key, key))
        if name in spelt:
            raise ConfigError(f"{spelt[name]}= and {key}= are the same setting; give one")
        spelt[name] = key
        if name in ours:
            own[name] = typed(key, value, kinds[name], name)
        elif name in theirs:
            args[name] = typed(key, value, kinds[name], name)
        else:
            known = ours | (theirs - set(ELSEWHERE)) | set(ALIASES) | set(OWN_ALIASES)
            raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}")
    return Options(**own), args, lora


def training_names() -> frozenset[str]:
    """The settings of transformers' TrainingArguments."""
    return frozenset(training_kinds())


@functools.cache
def training_kinds() -> dict[str, str]:
    """Setting -> annotation of transformers' TrainingArguments, read off its source: importing it
    takes seconds, and a misspelt word should be told at once."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("fit trains with transformers: pip install 'burnish[fit]'")
    file = Path(next(iter(spec.submodule_search_locations)), "training_args.py")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        body = next(n for n in tree.body if isinstance(n, ast.ClassDef)
                    and n.name == "TrainingArguments").body
    except (OSError, SyntaxError, StopIteration):           # laid out otherwise: ask the class
        from transformers import TrainingArguments

        return {f.name: str(f.type) for f in fields(TrainingArguments) if f.init}
    return {n.target.id: ast.unparse(n.annotation) for n in body if isinstance(n, ast.AnnAssign)
            and isinstance(n.target, ast.Name) and not _inner(n)}


def _inner(node: ast.AnnAssign) -> bool:
    """A field that is no argument, or no field at all."""
    said = ast.unparse(node.annotation) + (ast.unparse(node.value) if node.value else "")
    return "init=False" in said or "ClassVar" in said


#: smallest values that make sense, by transformers' names
LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
         "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "seed": 0, "data_seed": 0,
         "learning_rate": 0.0, "weight_decay": 0.0, "warmup_steps": 0.0, "max_grad_norm": 0.0,
         "max_length": 1, "max_answer": 1, "shots": 1, "points": 1, "early_stopping_patience": 1,
         "dimension": 2, "per_class": 2,
         "validation": 0.0, "num_train_epochs": 0.0,
         "max_steps": -1, "adam_epsilon": 0.0, "adam_beta1": 0.0, "adam_beta2": 0.0,
         "save_total_limit": 0, "samples": 0, "proportion_empty_prompts": 0.0, "resolution": 1,
         "guidance_scale": 0.0, "num_inference_steps": 1, "snr_gamma": 0.0,
         "label_smoothing_factor": 0.0, "eval_steps": 0.0, "save_steps": 0.0, "logging_steps": 0.0}
MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "adam_beta1": 1.0, "adam_beta2": 1.0,
        "label_smoothing_factor": 1.0, "proportion_empty_prompts": 1.0}


def kinds_of_task() -> dict[str, str]:
    """What a task may be told -> its kind, as declared: ``str``, ``int``, ``float`` or ``bool``."""
    declared = {f.name: str(f.type) for f in fields(Options)}
    return {n: declared[n].partition(" ")[0] for n in OF_TASK}


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def typed(key: str, value: Any, hint: str, name: str) -> Any:
    """A setting in the type it has: "1e-3" becomes 0.001, "true" True, 3.0 the whole number 3.

    Raises ConfigError for what cannot be meant: ``seed="abc"``, ``batch_size=0``, NaN.
    """
    words = set(re.findall(r"\w+", hint)) - {"None", "Optional", "Union", "typing"}
    simple = {k for k in _WORDS if k.__name__ in words}
    more = words - {k.__name__ for k in simple}      # an enumeration, a list: transformers' to say
    if value is None or "Any" in words or not simple or (more and not isinstance(value, str)):
        return value
    found = _as(value, simple)
    if found is None:
        raise ConfigError(f"{key}={shown(value, 60)}: expected "
                          f"{' or '.join(w for k, w in _WORDS.items() if k in simple)}")
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if number and not abs(found) < 2**63:
        raise ConfigError(f"{key}={shown(value, 60)}: expected a finite number below 2^63")
    if number and name in LEAST and found < LEAST[name]:
        raise ConfigError(f"{key}={found}: expected {LEAST[name]:g} or more")
    if number and name in MOST and found > MOST[name]:
        raise ConfigError(f"{key}={found}: expected {MOST[name]:g} or less")
    return found


def _as(value: Any, kinds: set[Any]) -> Any:
    """`value` as one of `kinds`, or None."""
    if type(value) in kinds:
        return value
    if isinstance(value, os.PathLike) and str in kinds:
        return str(value)
    if isinstance(value, str):
        word = value.strip().lower()
        if bool in kinds and word in ("true", "false"):
            return word == "true"
        if kinds & {int, float} and len(word) < 64:
            try:
                value = float(word) if re.search(r"[.enai]", word) else int(word)
            except ValueError:
                return None
    if isinstance(value, bool):
        return None
    if int in kinds and isinstance(value, int):
        return value
    if float in kinds and isinstance(value, int | float):
        return float(value) if abs(value) < 2**63 else value
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    return None


#: what people type for LoRA elsewhere, and what it is called in a recipe
_LORA = {"r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha",
         "lora_dropout": "dropout"}


def recipe_of(recipe: Any, lora: dict[str, Any]) -> Any:
    """LoRA's old flags as a recipe. Raises ConfigError beside a recipe that says otherwise."""
    if not lora:
        return recipe
    text = f"lora({', '.join(f'{k}={v!r}' for k, v in lora.items())})"
    if recipe is not None:
        raise ConfigError(f"lora's settings belong in the recipe: {text}, not beside {recipe!s}")
    return text
