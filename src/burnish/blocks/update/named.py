"""The state of any optimizer by parameter name, as tensors for safetensors and scalars for json.

torch keys optimizer state by position, so a model whose parameters are listed in another order
resumes with shifted moments and no error. Names do not shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.optim
from torch import Tensor, nn

from ...core.errors import FormatError

_NOT_HYPER = ("params", "param_names")
_EXTRA = "extra/"


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    out: dict[str, nn.Parameter] = {}
    for g in optimizer.param_groups:
        if "param_names" not in g:
            raise FormatError("this optimizer was made without parameter names; make it with "
                              "(name, parameter) pairs")
        out.update(zip(g["param_names"], g["params"], strict=True))
    return out


def named_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``({"<parameter>.<state>": tensor}, json-able rest)`` of an optimizer made with names.

    The rest holds ``state`` (scalars like a step count, by the same keys) and ``groups`` (names
    and hyperparameters of each group). What an optimizer has beyond its parameters it gives as
    ``extra_state() -> (tensors, json)``; those tensors are named ``extra/<name>``.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, p in _named(optimizer).items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value.detach()
            elif value is not None:
                scalars[f"{name}.{key}"] = value
    groups = [{"names": list(g["param_names"]),
               **{k: _plain(v) for k, v in g.items() if k not in _NOT_HYPER}}
              for g in optimizer.param_groups]
    rest: dict[str, Any] = {"state": scalars, "groups": groups}
    if hasattr(optimizer, "extra_state"):
        more, rest["extra"] = optimizer.extra_state()
        tensors.update({_EXTRA + k: v for k, v in more.items()})
    return tensors, rest


def load_named_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor],
                     scalars: Mapping[str, Any]) -> None:
    """The inverse of :func:`named_state`, for an optimizer over the same names.

    Raises FormatError for a name the optimizer lacks, and for groups that split the names
    otherwise. Nothing is changed then.
    """
    params = _named(optimizer)
    fresh: dict[nn.Parameter, dict[str, Any]] = {p: {} for p in params.values()}
    more = {k[len(_EXTRA):]: v for k, v in tensors.items() if k.startswith(_EXTRA)}
    tensors = {k: v for k, v in tensors.items() if not k.startswith(_EXTRA)}
    for key, value in {**tensors, **scalars["state"]}.items():
        name = _owner(key, params)
        p = params[name]
        if isinstance(value, Tensor):
            value = value.detach().clone().to(p.device)
        fresh[p][key[len(name) + 1 :]] = value
    here = {frozenset(g["param_names"]): g for g in optimizer.param_groups}
    there = {frozenset(g["names"]): g for g in scalars["groups"]}
    if set(here) != set(there):
        raise FormatError("the saved optimizer groups its parameters otherwise than this one")
    optimizer.state.clear()
    for p, state in fresh.items():
        if state:
            optimizer.state[p] = state
    for names, group in here.items():
        saved = {k: v for k, v in there[names].items() if k != "names"}
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v
                      for k, v in saved.items()})
    if hasattr(optimizer, "load_extra_state") and "extra" in scalars:
        optimizer.load_extra_state(more, scalars["extra"])


def _owner(key: str, params: Mapping[str, object]) -> str:
    """The longest parameter name that `key` starts with (names and states both have dots)."""
    name = key
    while name:
        name = name.rpartition(".")[0]
        if name in params:
            return name
    raise FormatError(f"optimizer state {key} belongs to no parameter that trains here")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
