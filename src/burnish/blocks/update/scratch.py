"""Weights that read as theta + scale z while a loss is evaluated, and are never written.

With a model, a module's perturbed weights exist while that module runs; which module to watch for
each parameter is found out by one plain evaluation (:class:`Callers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..tape.chunked import spans
from ..weight.waiting import put, value
from .noise import CounterNoise
from .rules import accumulator
from .subspace import in_memory_order

Evaluate = AbstractContextManager[Any]


def strip(device: torch.device) -> int:
    """Elements perturbed at a time: what stays in a core's cache, and whole panels of noise."""
    return 1 << (18 if device.type == "cpu" else 20)


def strips(n: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """``[lo, hi)`` of each strip of n elements."""
    return spans(n, strip(device))


def perturbed(p: Tensor, name: str, seed: int, scale: float, out: Tensor,
              noise: type[CounterNoise] = CounterNoise) -> Tensor:
    """out <- p + scale z, in slices; `out` may be `p` itself."""
    stream = noise(seed, name)
    here, there = in_memory_order(p)[0].reshape(-1), in_memory_order(out, like=p)[0].view(-1)
    for lo, hi in strips(p.numel(), p.device):
        z = stream.normal(hi - lo, lo, device=p.device).to(accumulator(p.dtype))
        if p.dtype == z.dtype:
            torch.add(here[lo:hi], z, alpha=scale, out=there[lo:hi])
        else:
            there[lo:hi].copy_(z.mul_(scale).add_(here[lo:hi]))
    return out


class Scratch(AbstractContextManager[None]):
    """Weights read as theta + scale z; the stored tensors are swapped out, never written.

    elsewhere: name -> the tensor that stands for theta there, where it is not the stored one.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], seed: int, scale: float,
                 callers: Callers | None, noise: type[CounterNoise] = CounterNoise,
                 elsewhere: Mapping[str, Tensor] = MappingProxyType({})):
        self.named, self.seed, self.scale, self.noise = dict(named), seed, scale, noise
        self.callers, self.elsewhere = callers, elsewhere
        self.kept: dict[str, tuple[Tensor, int]] = {}         # name -> (theta, depth)
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        if self.callers is None:
            self._swap(list(self.named))
            return
        self._swap(self.callers.always)
        for module, names in self.callers.during.items():
            self.hooks.append(module.register_forward_pre_hook(
                lambda *_, names=names: self._swap(names), prepend=True))
            self.hooks.append(module.register_forward_hook(
                lambda *_, names=names: self._restore(names), always_call=True))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for name, (theta, _) in self.kept.items():
            put(self.named[name], theta)
        self.kept.clear()

    def _swap(self, names: Iterable[str]) -> None:
        for name in names:
            p = self.named.get(name)
            if p is None:                            # at rest
                continue
            if name in self.kept:
                theta, depth = self.kept[name]
            else:
                at, depth = self.elsewhere[name] if name in self.elsewhere else value(p), 0
                theta = put(p, perturbed(at, name, self.seed, self.scale, torch.empty_like(at),
                                         self.noise))
                del at
            self.kept[name] = theta, depth + 1

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.kept:
                continue
            theta, depth = self.kept[name]
            if depth == 1:
                put(self.named[name], theta)
                del self.kept[name]
            else:
                self.kept[name] = theta, depth - 1


class Callers:
    """Which module to watch for each parameter: its owner if the forward calls it, else the
    nearest module above that is called; `always` where there is none."""

    def __init__(self, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]):
        self.model, self.names = model, {id(p): n for n, p in named}
        self.during: dict[nn.Module, list[str]] = {}
        self.always: list[str] = []
        self.called: dict[str, int] = {}             # path -> how many were called before it
        self.first: dict[str, int] = {}              # name -> the same of what is watched for it

    def watch(self) -> Evaluate:
        """A context for one plain evaluation that notes which modules are called."""
        return Watch(self)

    def settle(self, called: dict[str, int]) -> None:
        self.called = called
        owned: set[str] = set()
        for path, module in self.model.named_modules(remove_duplicate=False):
            for p in module._parameters.values():
                name = self.names.get(id(p))
                if name is None:
                    continue
                owned.add(name)
                up = path
                while up and up not in called:
                    up = up.rpartition(".")[0]
                if up in called:
                    names = self.during.setdefault(self.model.get_submodule(up), [])
                    if name not in names:
                        names.append(name)
                    self.first[name] = min(self.first.get(name, called[up]), called[up])
                else:
                    self.always.append(name)
        self.always += [n for n in self.names.values() if n not in owned]
        self.first.update(dict.fromkeys(self.always, 0))


class Watch(AbstractContextManager[None]):
    def __init__(self, callers: Callers):
        self.callers = callers
        self.called: dict[str, int] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        for path, module in self.callers.model.named_modules(remove_duplicate=False):
            self.hooks.append(module.register_forward_pre_hook(
                lambda *_, path=path: self._note(path)))

    def _note(self, path: str) -> None:
        self.called.setdefault(path, len(self.called))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.callers.settle(self.called)
