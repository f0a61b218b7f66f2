"""Everything a run needs to go on exactly where it stopped, as JSON and safetensors.

A *tree* is what state dicts are made of: dictionaries, lists, tuples, numbers, text, tensors.
:func:`pack` splits one into JSON and named tensors, :func:`unpack` puts it together again, bit for
bit. Optimizer state is keyed by parameter *name*, so it can never land on another parameter.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks.update.noise import ScalarLog
from ..core.errors import FormatError, nearest
from ..core.processes import alike, gathered, is_sharded
from ..core.reading import plain, reading
from ..formats import safe

_MARK = "__is__"


# -- trees ------------------------------------------------------------------------------------
def pack(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """(JSON, tensors by path). Raises FormatError, with the path, for what is neither."""
    tensors: dict[str, Tensor] = {}

    def go(x: Any, at: str) -> Any:
        if x is None or isinstance(x, bool | str):
            return x
        if isinstance(x, int | float):
            return x.item() if isinstance(x, np.generic) else x
        if isinstance(x, np.generic):
            return x.item()
        if isinstance(x, np.ndarray):
            name = at or "value"
            unsigned = x.dtype == np.uint32
            tensors[name] = torch.from_numpy(x.astype(np.int64) if unsigned else x.copy())
            return {_MARK: "array", "name": name, "dtype": str(x.dtype)}
        if isinstance(x, Tensor):
            name = at or "value"
            tensors[name] = x.detach()
            return {_MARK: "tensor", "name": name, "device": x.device.type}
        if isinstance(x, torch.Generator):
            return {_MARK: "generator", "state": go(x.get_state(), f"{at}.state")}
        if isinstance(x, torch.dtype | torch.device):
            return {_MARK: type(x).__name__, "value": str(x).removeprefix("torch.")}
        if isinstance(x, Mapping):
            if all(isinstance(k, str) for k in x) and _MARK not in x:
                return {k: go(v, f"{at}.{k}" if at else k) for k, v in x.items()}
            return {_MARK: "map", "items": [[go(k, f"{at}.key{i}"), go(v, f"{at}.{k}")]
                                            for i, (k, v) in enumerate(x.items())]}
        if isinstance(x, list | tuple | set):
            items = [go(v, f"{at}.{i}") for i, v in enumerate(x)]
            return items if isinstance(x, list) else {_MARK: type(x).__name__, "items": items}
        raise FormatError(f"{at}: a {type(x).__name__} cannot be kept without pickling it")

    return go(tree, path), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`pack`."""
    if isinstance(tree, list):
        return [unpack(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_MARK)
    if kind is None:
        return {k: unpack(v, tensors) for k, v in tree.items()}
    if kind == "tensor":
        return tensors[tree["name"]].clone()
    if kind == "array":
        return tensors[tree["name"]].numpy().astype(tree["dtype"])
    if kind == "generator":
        state = unpack(tree["state"], tensors)
        g = torch.Generator()
        g.set_state(state)
        return g
    if kind == "dtype":
        found = getattr(torch, tree["value"], None)
        if not isinstance(found, torch.dtype):
            raise FormatError(f"{plain(tree['value'], 40)} is no dtype")
        return found
    if kind == "device":
        return torch.device(tree["value"])
    items = tree["items"]
    if kind == "map":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in items}
    made = [unpack(v, tensors) for v in items]
    return set(made) if kind == "set" else tuple(made)


def save_tree(tree: Any, folder: Path, name: str) -> None:
    """`name`.json, and `name`.safetensors where there are tensors."""
    plain, tensors = pack(tree)
    if tensors:
        safe.save_file({k: v.cpu() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    safe.write_json(folder / f"{name}.json", {"tree": plain})


def load_tree(folder: Path, name: str) -> Any:
    """Raises FormatError for what :func:`save_tree` did not write so."""
    file = folder / f"{name}.safetensors"
    with reading(folder / f"{name}.json", advice="it is not what a checkpoint holds"):
        tensors = safe.load_file(file) if file.exists() else {}
        return unpack(safe.read_json(folder / f"{name}.json")["tree"], tensors)


# -- the optimizer, by name -----------------------------------------------------------------------
def optimizer_state(optimizer: torch.optim.Optimizer,
                    named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """The optimizer's state dict with parameter names in place of its numbers. What is sharded is
    gathered: then every process has to ask, and each has all of it."""
    names = {id(p): n for n, p in named}
    held = [p for g in optimizer.param_groups for p in g["params"]]
    by_number = [names.get(id(p)) for p in held]
    if missing := [tuple(p.shape) for p, n in zip(held, by_number, strict=True) if n is None]:
        raise FormatError(f"the optimizer holds a parameter of shape {missing[0]} that the tuned "
                          "model does not train, so its state has no name to be kept under")
    state = optimizer.state_dict()
    groups = [{**{k: v for k, v in g.items() if k != "params"},
               "params": [by_number[i] for i in g["params"]]} for g in state["param_groups"]]
    rest = {k: v for k, v in state.items() if k not in ("state", "param_groups")}
    return {"state": {_named(k, by_number): _whole(v) for k, v in state["state"].items()},
            "groups": groups, "rest": rest}


def scalar_log(folder: Path) -> ScalarLog:
    """The log of a zeroth-order run, out of its checkpoint: with the starting weights it is the
    run. ``tuned.optimizer(...).replay(log)`` repeats it, without data and bit for bit.

    Raises FormatError for a checkpoint of another kind of run.
    """
    tree = load_tree(folder, "optimizer")
    with reading("the optimizer state of a checkpoint"):
        kept = tree["rest"].get("log")
    if kept is None:
        raise FormatError(f"{folder} is of a run with gradients, which leaves no log of scalars; "
                          "expected a checkpoint of mezo or a relative")
    return ScalarLog.from_tensors(*kept)


def load_optimizer_state(optimizer: torch.optim.Optimizer,
                         named: Iterable[tuple[str, nn.Parameter]], kept: dict[str, Any]) -> None:
    """Puts :func:`optimizer_state` back, every tensor in the dtype in which it was kept.

    (torch's own loading casts state to the parameter's dtype, which would round fp32 moments of
    bf16 weights and destroy coded ones.) Raises FormatError when names do not agree.
    """
    with reading("the optimizer state of a checkpoint"):
        _load_optimizer_state(optimizer, named, kept)


def _load_optimizer_state(optimizer: torch.optim.Optimizer,
                          named: Iterable[tuple[str, nn.Parameter]], kept: dict[str, Any]) -> None:
    named = list(named)
    names = {id(p): n for n, p in named}
    held = [names.get(id(p), "?") for g in optimizer.param_groups for p in g["params"]]
    known = [n for g in kept["groups"] for n in g["params"]]
    if set(held) != set(known):
        extra = sorted(set(known) ^ set(held))[0]
        raise FormatError(f"the optimizer state was kept for other parameters: {extra!r} is on one "
                          f"side only{nearest(extra, held)}")
    number = {n: i for i, n in enumerate(held)}
    devices = {n: p.device for n, p in named}
    sharded = {n: p for n, p in named if is_sharded(p)}
    # counts live on the host, except where a fused or captured step reads them on the device
    beside = {names[id(p)] for g in optimizer.param_groups for p in g["params"]
              if g.get("fused") or g.get("capturable")}
    state = {number.get(k, k): _parts(_to(v, devices.get(k), k in beside), sharded.get(k))
             for k, v in kept["state"].items()}
    groups = [_group(kept["groups"], [names[id(p)] for p in g["params"]], number)
              for g in optimizer.param_groups]
    whole = {"state": state, "param_groups": groups, **kept["rest"]}
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        optimizer.load_state_dict(whole)
        return
    params = [p for g in optimizer.param_groups for p in g["params"]]
    optimizer.state.clear()
    for key, value in state.items():
        optimizer.state[params[key] if isinstance(key, int) else key] = value
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in saved.items() if k != "params"})


def _group(kept: list[dict[str, Any]], held: list[str], number: Mapping[str, int]
           ) -> dict[str, Any]:
    """The settings that were kept for these parameters. Groups follow what is sharded too, so they
    are found by name."""
    mine = [{k: v for k, v in g.items() if k not in ("params", "param_names")}
            for g in kept if set(held) & set(g["params"])]
    if any(other != mine[0] for other in mine[1:]):
        raise FormatError(f"the optimizer state was kept with other groups: {held[0]!r} and others "
                          "of its group had settings of their own")
    return {**(mine[0] if mine else {}), "params": [number[n] for n in held]}


def _named(key: Any, names: list[str | None]) -> Any:
    return names[key] if isinstance(key, int) and key < len(names) else key


def _whole(value: Any) -> Any:
    """The state of one parameter with all of every tensor."""
    if isinstance(value, Tensor):
        return gathered(value)
    return {k: _whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def _parts(value: Any, p: nn.Parameter | None) -> Any:
    """What is as large as a sharded parameter, sharded as it is."""
    if p is None:
        return value
    if isinstance(value, Tensor):
        return alike(value, p) if value.shape == p.shape else value
    return {k: _parts(v, p) for k, v in value.items()} if isinstance(value, dict) else value


def _to(value: Any, device: torch.device | None, scalars: bool) -> Any:
    """Tensors of a parameter's state beside their parameter, counts only if `scalars`."""
    if isinstance(value, Tensor):
        return value.to(device) if device is not None and (scalars or value.dim()) else value
    if isinstance(value, dict):
        return {k: _to(v, device, scalars) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(v, device, scalars) for v in value)
    return value


# -- random generators ---------------------------------------------------------------------------
def random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators, those of accelerators included."""
    state: dict[str, Any] = {"python": random.getstate(),
                             "numpy": np.random.get_state(legacy=False),
                             "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def go_on_drawing(folder: Path, rank: int, before: int, now: int, seed: int) -> None:
    """This process's generators as they were; where other processes had them, new ones, the same
    each time."""
    if before == now:
        set_random_state(load_tree(folder, f"rng-{rank}"))
        return
    own = seed * 1009 + rank
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def set_random_state(state: dict[str, Any]) -> None:
    with reading("the random state of a checkpoint"):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
