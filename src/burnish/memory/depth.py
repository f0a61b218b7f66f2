"""Runs of equal blocks in a model, and the same model with fewer of them.

A stack is a list of blocks that reads ``before, pattern x rounds, after``: `period` blocks that
come again and again (one in most models; two where every second block is a mixture of experts,
four where every fourth attends to everything), with blocks of their own at either end. What makes
two blocks equal is read off the modules: classes, shapes, dtypes, flags, plain attributes, and
what the config says of each layer. A block that differs in anything but its own number (a rate of
drop path that grows, a rank of its own) is not equal, and the pattern has to hold for all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy

#: what configs and modules call the number of their blocks
_DEPTH = re.compile(r"layers?$|^depth$|^n_layer|num_hidden|num_blocks|^layers_")
_PLAIN = (int, float, str, bool, type(None), torch.dtype)


@dataclass(frozen=True)
class Stack:
    """One list of blocks. path: of the list. before, after: blocks outside the pattern."""

    path: str
    before: int
    period: int
    rounds: int
    after: int

    @property
    def length(self) -> int:
        return self.before + self.period * self.rounds + self.after

    def kept(self, rounds: int) -> list[int]:
        """Which of its blocks a model of fewer rounds keeps."""
        head = self.before + self.period * rounds
        return [*range(head), *range(self.length - self.after, self.length)]

    def split(self, index: int, rounds: int) -> tuple[str, int]:
        """(what a block of a model with `rounds` is called in every depth, its round)."""
        inner = index - self.before
        if inner < 0:
            return f"first {index}", -1
        if inner < self.period * rounds:
            return f"each {inner % self.period}", inner // self.period
        return f"last {inner - self.period * rounds}", -1

    def index(self, name: str, turn: int, rounds: int) -> int:
        """The inverse of :meth:`split`."""
        kind, _, number = name.partition(" ")
        inner = {"first": 0, "each": self.before + turn * self.period,
                 "last": self.before + self.period * rounds}[kind]
        return inner + int(number)


class Paths:
    """Module paths of a model of certain rounds, with and without the numbers of blocks."""

    def __init__(self, stacks: tuple[Stack, ...], rounds: tuple[int, ...]):
        self.stacks, self.rounds = stacks, rounds

    def split(self, path: str) -> tuple[str, int]:
        """``layers.3.mlp`` -> (``layers.<each 0>.mlp``, 3)."""
        for stack, rounds in zip(self.stacks, self.rounds, strict=True):
            if path.startswith(f"{stack.path}."):
                number, dot, rest = path[len(stack.path) + 1:].partition(".")
                if number.isdigit():
                    name, turn = stack.split(int(number), rounds)
                    return f"{stack.path}.<{name}>{dot}{rest}", turn
        return path, -1

    def join(self, module: str, turn: int) -> str:
        head, found, tail = module.partition(".<")
        if not found:
            return module
        name, _, rest = tail.partition(">")
        n = next(i for i, s in enumerate(self.stacks) if s.path == head)
        return f"{head}.{self.stacks[n].index(name, turn, self.rounds[n])}{rest}"

    def stack_of(self, module: str) -> int:
        """Which stack a module without its number belongs to; -1: none."""
        head, found, _ = module.partition(".<each ")
        return next((i for i, s in enumerate(self.stacks) if found and s.path == head), -1)


class Unlike(Exception):
    """A list in which the blocks do not stand one after another, each with as much."""


def order_of(names: list[str], few: Paths, whole: Paths) -> list[int]:
    """Names of tensors in the model `few`, as those of the model `whole` stand in their list: for
    each tensor there, which of these is the one of a block like its own.

    Raises Unlike where the order of the longer list cannot be known.
    """
    split = [few.split(name) for name in names]
    runs = [(stack, list(run)) for stack, run in groupby(
        range(len(names)), lambda n: few.stack_of(split[n][0]))]
    if len({s for s, _ in runs if s >= 0}) != sum(s >= 0 for s, _ in runs):
        raise Unlike                          # a stack in two places
    out: list[int] = []
    for stack, run in runs:
        if stack < 0:
            out += run
            continue
        each = len(run) // few.rounds[stack]
        first = [split[n][0] for n in run[:each]]
        if [split[n] for n in run] != [(name, turn) for turn in range(few.rounds[stack])
                                       for name in first]:
            raise Unlike
        out += run[:each] * whole.rounds[stack]
    return out


def stacks_of(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of `model` in which a pattern comes three times or more."""
    modules = dict(model.named_modules())
    lists: dict[str, list[str]] = {}
    for block in Anatomy.of(model).blocks:
        parent, _, number = block.path.rpartition(".")
        if number.isdigit() and isinstance(modules.get(parent), nn.ModuleList | nn.Sequential):
            lists.setdefault(parent, []).append(number)
    shared = _shared(model)
    out = []
    for path, numbers in lists.items():
        whole = list(modules[path]._modules)
        if numbers != whole or whole != [str(n) for n in range(len(whole))]:
            continue                              # not the list alone
        blocks = [modules[path][n] for n in range(len(whole))]
        told = _layered(model, len(blocks))
        looks = [(_look(b, n, shared), *(values[n] for values in told))
                 for n, b in enumerate(blocks)]
        found = _pattern(looks)
        if found is not None:
            out.append(Stack(path, *found))
    if any(a.path.startswith(f"{b.path}.") for a in out for b in out):
        return ()                                 # a stack within a block
    return tuple(out)


def shallow(model: nn.Module, stacks: tuple[Stack, ...], rounds: tuple[int, ...]) -> nn.Module:
    """A copy of `model` on meta with so many rounds of each stack. Nothing of `model` is read."""
    memo: dict[int, Any] = {}
    gone: dict[int, dict[str, Any]] = {}
    for stack, n in zip(stacks, rounds, strict=True):
        container = model.get_submodule(stack.path)
        kept = [container._modules[str(i)] for i in stack.kept(n)]
        gone[id(container)] = {"module": container, "kept": kept}
    with _cut(gone):
        keep: list[Tensor] = []
        for module in model.modules():
            for t in (*module._parameters.values(), *module._buffers.values(),
                      *vars(module).values()):
                if isinstance(t, Tensor) and id(t) not in memo:
                    keep.append(t)
                    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
                    memo[id(t)] = nn.Parameter(made, requires_grad=t.requires_grad) \
                        if isinstance(t, nn.Parameter) else made
        twin = copy.deepcopy(model, memo)
    for stack, n in zip(stacks, rounds, strict=True):
        _renumber(twin, stack, n)
    return twin


class _cut:
    """Lists that hold fewer blocks for a while."""

    def __init__(self, gone: dict[int, dict[str, Any]]):
        self.gone = gone

    def __enter__(self) -> None:
        for entry in self.gone.values():
            entry["all"] = entry["module"]._modules
            entry["module"]._modules = {str(n): m for n, m in enumerate(entry["kept"])}

    def __exit__(self, *exc: Any) -> None:
        for entry in self.gone.values():
            entry["module"]._modules = entry["all"]


def _renumber(twin: nn.Module, stack: Stack, rounds: int) -> None:
    """What says how many blocks there are, or one thing for each, says it of the fewer."""
    kept = stack.kept(rounds)
    above = [twin.get_submodule(stack.path.rsplit(".", n)[0] if "." in stack.path else "")
             for n in range(1, stack.path.count(".") + 1)] or [twin]
    for holder in (*above, twin, *_configs(twin)):
        values = vars(holder)
        for name, value in list(values.items()):
            if isinstance(value, list | tuple) and len(value) == stack.length \
                    and not isinstance(value, nn.Module):
                values[name] = type(value)(value[i] for i in kept)
            elif isinstance(value, int) and not isinstance(value, bool) \
                    and value == stack.length and _DEPTH.search(name):
                values[name] = len(kept)
    for position, (block, old) in enumerate(zip(twin.get_submodule(stack.path), kept,
                                                strict=True)):
        for module in block.modules():
            for name, value in list(vars(module).items()):
                if name in _NUMBERS and type(value) is int and value == old:
                    setattr(module, name, position)


#: attributes by which a block knows its own number
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "idx", "index")


def _configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    todo = [m.config for m in model.modules() if hasattr(m, "config")]
    while todo:
        config = todo.pop()
        if id(config) in seen or not hasattr(config, "__dict__") \
                or isinstance(config, nn.Module):
            continue
        seen.add(id(config))
        yield config
        todo += [v for v in vars(config).values() if hasattr(v, "to_diff_dict")]


def _layered(model: nn.Module, length: int) -> list[list[Any]]:
    """What configs say of each of `length` layers."""
    return [[repr(v) for v in value] for config in _configs(model)
            for _, value in sorted(vars(config).items())
            if isinstance(value, list | tuple) and len(value) == length]


def _shared(model: nn.Module) -> dict[int, int]:
    """How many places hold each parameter."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                counts[id(p)] = counts.get(id(p), 0) + 1
    return counts


def _look(block: nn.Module, number: int, shared: Mapping[int, int]) -> tuple[Any, ...]:
    """All that makes one block differ from another, but for its number and its values."""
    out: list[Any] = []
    for path, module in block.named_modules(remove_duplicate=False):
        out += [path, type(module), module.training]
        for name, p in (*module._parameters.items(), *module._buffers.items()):
            out.append((name, None) if p is None else
                       (name, p.shape, p.stride(), p.dtype, p.requires_grad,
                        id(p) if shared.get(id(p), 1) > 1 else 0))
        for name, value in sorted(vars(module).items()):
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if name in _NUMBERS and type(value) is int:
                out.append((name, value - number))
            elif isinstance(value, _PLAIN):
                out.append((name, value))
            elif isinstance(value, Tensor):
                out.append((name, value.shape, value.dtype))
            elif isinstance(value, list | tuple | set | dict):
                out.append((name, len(value), repr(value) if _simple(value) else ""))
            else:
                out.append((name, getattr(value, "__qualname__", None) or type(value)))
    return tuple(out)


def _simple(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_simple(k) and _simple(v) for k, v in value.items())
    return isinstance(value, _PLAIN) or isinstance(value, list | tuple | set) and all(
        _simple(v) for v in value)


def _pattern(looks: list[Any]) -> tuple[int, int, int, int] | None:
    """(before, period, rounds, after) that leaves the fewest blocks in a short model."""
    numbers = {look: n for n, look in reversed(list(enumerate(looks)))}
    text = [numbers[look] for look in looks]
    best: tuple[int, tuple[int, int, int, int]] | None = None
    for period in range(1, len(text) // 3 + 1):
        for before in range(len(text) - 3 * period + 1):
            end = before + period
            while end < len(text) and text[end] == text[end - period]:
                end += 1
            rounds = (end - before) // period
            if rounds < 3:
                continue
            after = len(text) - before - rounds * period
            cost = before + period + after
            if best is None or cost < best[0]:
                best = cost, (before, period, rounds, after)
    return None if best is None else best[1]
