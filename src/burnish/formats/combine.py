"""Several folders of tuned weights made into one: model folders, or adapters that are sums of B A.

Everything is checked before anything is written: one kind of folder, one architecture or one base,
no output that is an input. Weights are read and written one tensor at a time; the configuration,
tokenizer or image processor beside them are the first folder's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks.weight.checkpoints import blended, facts, mixed
from ..blocks.weight.factor_algebra import Factors, cat, linear, svd
from ..blocks.weight.taskvector import Changed, Rule, Task, TaskVector, combine, planned
from ..core.errors import ConfigError
from ..core.method import Method
from ..core.recipe import Recipe, parse
from . import safe
from .folder import CONFIG, RUN, read_adapter, read_config, read_run, write_adapter
from .model_files import check_config, copy_processor

#: of a run's facts, what says how its adapter is used
TASK = ("model", "data", "tasks", "training", "max_length")


def kind_of(folders: Sequence[Path]) -> str:
    """"adapter" or "model": what all of these are. ConfigError for two kinds, or for none."""
    kinds = [_kind(f) for f in folders]
    if len(set(kinds)) > 1:
        a, m = folders[kinds.index("adapter")], folders[kinds.index("model")]
        raise ConfigError(f"{a} holds an adapter and {m} a whole model, which have no sum; make "
                          f"{a} one with `burnish merge` first")
    return kinds[0]


def of_peft(folder: Path) -> bool:
    """Is it an adapter folder that PEFT wrote?"""
    return (folder / CONFIG).is_file() and "peft_type" in safe.read_json(folder / CONFIG)


def _kind(folder: Path) -> str:
    if (folder / CONFIG).is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        safe.weight_files(folder)                    # its weights are there, and not pickled
        return "model"
    read_config(folder)                              # says what is wrong with it
    raise ConfigError(f"{folder} holds neither a model nor an adapter")


# -- whole models -----------------------------------------------------------------------------
def open_models(folders: Sequence[Path]) -> list[safe.Tensors]:
    """Their checkpoints. ConfigError where the configurations are not of one architecture, or
    weights are held as codes, which have no sum."""
    configs = [check_config(f) for f in folders]
    for folder, config in zip(folders, configs, strict=True):
        if "quantization_config" in config:
            raise ConfigError(f"{folder} holds quantised weights; codes cannot be added: give the "
                              "model in a floating-point type")
        for key in ("model_type", "architectures"):
            if config.get(key) != configs[0].get(key):
                raise ConfigError(f"{folder} is of another architecture: {key} is "
                                  f"{config.get(key)}, that of {folders[0]} {configs[0].get(key)}")
    return [safe.Tensors(f) for f in folders]


def sum_models(folders: Sequence[Path], weights: Sequence[float], new: Path) -> None:
    """``sum_i w_i theta_i`` as a model folder in `new`; every name and shape must agree."""
    models = open_models(folders)
    _write_model(mixed(models, lambda name: weights), models[0], folders[0], new)


def add_models(base: Path, tuned: Sequence[Path], weights: Sequence[float], new: Path
               ) -> dict[str, str]:
    """``theta_0 + sum_t w_t (theta_t - theta_0)`` as a model folder; as :func:`merge_models`."""
    return _merge(base, tuned, lambda tasks: (tasks, _weighted(weights)), new)


def merge_models(base: Path, tuned: Sequence[Path], weights: Sequence[float],
                 parts: Sequence[Any], new: Path) -> dict[str, str]:
    """``theta_0 + rule(w_1 (theta_1 - theta_0), ...)`` as a model folder; tensors that stay the
    base's, and why. parts: changes of task vectors, then a rule (blocks/weight/taskvector.py).
    Heads and vocabularies of other sizes stay; other shapes are another base's."""
    def plan(tasks: Sequence[Task]) -> tuple[Sequence[Task], Rule]:
        return planned(parts, [t if w == 1 else Changed(t, lambda tau, *_, w=w: w * tau)
                               for t, w in zip(tasks, weights, strict=True)])

    return _merge(base, tuned, plan, new)


def _weighted(weights: Sequence[float]) -> Rule:
    w = torch.tensor(weights, dtype=torch.float64)
    return lambda taus, *_: w.to(taus.device) @ taus


def _merge(base: Path, tuned: Sequence[Path],
           plan: Callable[[Sequence[Task]], tuple[Sequence[Task], Rule]], new: Path
           ) -> dict[str, str]:
    first, *models = open_models([base, *tuned])
    tasks = [TaskVector(first, m) for m in models]
    for folder, model, task in zip(tuned, models, tasks, strict=True):
        if not task.names:
            raise ConfigError(f"{folder} has no tensor in common with {base}")
        for name in first:
            if name in model and (one := facts(first, name).shape) != (two := facts(
                    model, name).shape) and (one[1:] != two[1:] or len(one) != len(two)):
                raise ConfigError(f"{folder} was not tuned from {base}: {name} is {list(two)} "
                                  f"beside {list(one)}")
    changed, rule = plan(tasks)
    _write_model(combine(first, changed, rule), first, base, new)
    return {n: why for t in tasks for n, why in t.skipped.items() if n in first or n in t.tuned}


def _write_model(stream: Iterable[tuple[str, Tensor]], like: safe.Tensors, beside: Path, new: Path
                 ) -> None:
    safe.save_stream(stream, like, new / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        if (beside / name).is_file():
            shutil.copy2(beside / name, new / name)
    copy_processor([beside], new)


# -- adapters ---------------------------------------------------------------------------------
def sum_adapters(folders: Sequence[Path], weights: Sequence[float], new: Path,
                 rank: int | None = None, base: Path | None = None, form: str = "cat",
                 mean: bool = False) -> dict[str, str]:
    """``sum_i w_i Delta_i`` as one LoRA adapter in `new`, by stacking factors: its rank is the sum
    of theirs, and nothing is lost. rank: the best approximation of that rank instead. form: "svd",
    the same of the largest rank among them; "linear", sums of the factors themselves, which has
    cross terms (blocks/weight/factor_algebra.py).
    mean: heads are averaged, whatever the weights.

    What they train whole (a head) is averaged where the weights add up to 1; else
    ``w_0 + sum_i w_i (w_i - w_0)`` with w_0 of the model folder `base`. ConfigError for adapters of
    different bases, of other methods, or on different places.
    """
    read = [read_adapter(f) for f in folders]
    loras = [_lora(f, config) for f, (config, _) in zip(folders, read, strict=True)]
    _one_base(folders, [config for config, _ in read])
    files = [tensors for _, tensors in read]
    for folder, held in zip(folders[1:], files[1:], strict=True):
        if odd := sorted(held.keys() ^ files[0].keys()):
            raise ConfigError(f"{folder} and {folders[0]} do not tune the same places: {odd[0]} is "
                              "not in both")
    pairs = [n.removesuffix(".A") for n in files[0] if n.endswith(".lora.A")]
    total = sum(f[f"{pairs[0]}.A"].shape[-2] for f in files)
    ranks = [f[f"{pairs[0]}.A"].shape[-2] for f in files]
    out, made = {}, rank or (total if form == "cat" else max(ranks))
    for name in pairs:
        A, B = f"{name}.A", f"{name}.B"
        chains = [Factors(f[A].double(), f[B].double(), m.scale)
                  for f, (_, m) in zip(files, loras, strict=True)]
        side = min(chains[0].A.shape[-1], chains[0].B.shape[-2])
        if made > side:
            raise ConfigError(f"the sum has rank {made}, and {name.partition('.burnish.')[0]} has "
                              f"no room for more than {side}: give --rank {side} or less")
        one = linear(chains, weights) if form == "linear" else \
            cat(chains, weights) if made == total else svd(chains, weights, made)
        out[A], out[B] = one.A.to(files[0][A].dtype), one.B.to(files[0][B].dtype)
    left = [n for n in files[0] if n not in out]
    out |= _whole(left, files, [1 / len(files)] * len(files) if mean else weights, base)
    recipe, mine = loras[0]
    summed = replace(mine, rank=made, alpha=float(made), scaling="lora")
    parts = Recipe(summed if m is mine else m for m in recipe)
    _write_sum(folders, read[0][0], parts, out, new)
    return {n: "averaged" if mean or base is None else "added" for n in left}


def _lora(folder: Path, config: Mapping[str, Any]) -> tuple[Recipe, Any]:
    """(recipe, its one lora) of an adapter that is nothing else in the weights."""
    entries = config.get("adapters") or {"": config}
    if len(entries) > 1:
        raise ConfigError(f"{folder} holds several adapters ({', '.join(entries)}); save the one "
                          "that is meant by itself")
    recipe = parse(next(iter(entries.values()))["recipe"])
    deltas = [m for m in recipe if {"delta", "branch", "prompt", "side", "mixture"} & set(m.axes())]
    chains = [m for m in deltas if m.name == "lora" and m.train_a]
    if len(chains) != 1 or len(deltas) != 1:
        raise ConfigError(f"{folder} is {recipe}, which is no sum of factors B A that could be "
                          "stacked (lora is); make whole models of the adapters with `burnish "
                          "merge`, and give those")
    return recipe, chains[0]


def _one_base(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> None:
    def lines(config: Mapping[str, Any]) -> Mapping[str, str]:
        return (config["base"].get("fingerprint") or {}).get("tensors", {})

    for folder, config in zip(folders[1:], configs[1:], strict=True):
        one, two = lines(configs[0]), lines(config)
        for name in sorted({*one, *two}):
            if one.get(name) != two.get(name):
                raise ConfigError(f"{folder} was made on another base than {folders[0]}: {name} is "
                                  f"{two.get(name, 'missing')}, not {one.get(name, 'there')}")


def _whole(names: Sequence[str], files: Sequence[Mapping[str, Tensor]], weights: Sequence[float],
           base: Path | None) -> dict[str, Tensor]:
    """What the adapters hold whole."""
    w = torch.tensor(weights, dtype=torch.float64)
    start = safe.Tensors(base) if base is not None else {}
    out = {}
    for name in names:
        held = [f[name] for f in files]
        if any(t.shape != held[0].shape for t in held):
            raise ConfigError(f"{name} has different shapes in these adapters")
        if not held[0].is_floating_point():
            out[name] = held[0]
        elif abs(float(w.sum()) - 1) < 1e-9:         # the base's part of it is nothing
            out[name] = blended(held, lambda rows, _: w @ rows)
        elif name in start and facts(start, name).shape == held[0].shape:
            out[name] = blended([start[name].to(held[0].dtype), *held],
                                lambda rows, _: rows[0] + w @ (rows[1:] - rows[0]))
        else:
            raise ConfigError(f"{name} is trained whole, and the base has none of this shape to "
                              "take a difference from; weights that add up to 1 need none")
    return out


def _write_sum(folders: Sequence[Path], config: Mapping[str, Any], recipe: Recipe,
               tensors: Mapping[str, Tensor], new: Path) -> None:
    (name, entry), = (config.get("adapters") or {"default": config}).items()
    keep = ("base", "targets", "head", "seed", "selected", "active", "training")
    own = {k: config[k] for k in keep if k in config} | {
        "recipe": str(recipe), "parts": [_part(m) for m in recipe],
        "adapters": {name: {k: v for k, v in entry.items()
                            if k in ("targets", "head", "seed", "settled")}
                     | {"recipe": str(recipe)}}}
    run = facts_of_task(folders[0])
    if run is not None:
        run |= {"recipe": str(recipe), "made_of": [str(f) for f in folders]}
    write_adapter(new, tensors, own, run=run)
    copy_processor([folders[0]], new)


def facts_of_task(folder: Path) -> dict[str, Any] | None:
    """Of a finished run, what says how its adapter is used; None where there is no run."""
    if not (folder / RUN).is_file():
        return None
    found = read_run(folder)
    return {k: found[k] for k in TASK if k in found}


def _part(method: Method) -> dict[str, Any]:
    return {"method": method.name, **method.settings()}
