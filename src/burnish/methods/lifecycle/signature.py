from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...blocks.tape.codes import packed, unpacked
from ...blocks.weight.checkpoints import PIECE, Checkpoint
from ...blocks.weight.coded import Coded, Read
from ...blocks.weight.taskvector import Changed, Reader, Task, TaskVector, combine
from ...core.errors import ConfigError, FormatError
from ...core.method import Method, setting

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_FIRST = re.compile(r"embed|patch|wte|wpe|stem|conv1\b")


@dataclass(frozen=True, kw_only=True)
class Signature(Method):
    """Robust weight signatures: the part of a change that points away from the weights themselves.

    theta_c was trained on clean data, theta_k on a corruption of them. Tensor by tensor, as
    vectors: ``R = theta_k - (<theta_k, theta_c> / |theta_c|^2) theta_c``, so ``<R, theta_c> = 0``,
    for the embeddings and the first `layers` blocks alone; R is held in `bits` bits, symmetric, one
    scale ``max|R| / (2^(bits - 1) - 1)`` a tensor. ``theta = theta_c + sum_k strength R_k``:
    patches add up, and a model without them is the clean one, bit for bit: its file never changes.

    Before a rule it changes task vectors (``burnish combine A B --base CLEAN --how "signature(
    layers=3) + task_arithmetic(scale=1)"``); as a way to compress it is the patch as a file
    (``burnish compress ROBUST --base CLEAN --how signature``). A block is known by the first
    number in a tensor's name. Trains nothing. Running statistics of batch norms are no weights:
    measure them again. The equations are a best reading of the paper (unconfirmed).
    """

    paper = "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights? (2023), " \
            "arXiv:2302.12480"
    tier = "checked against an independent equation"

    layers: int | None = setting(None, "how many blocks from the first; None: all of the model")
    bits: int = setting(8, "of an entry, 2 to 8; 32 keeps R as it is", other=(4,))
    strength: float = setting(1.0, "what a patch counts")

    def __post_init__(self) -> None:
        if self.bits not in (*range(2, 9), 32) or (self.layers is not None and self.layers < 0):
            raise ConfigError("signature: 2 to 8 bits (or 32) and 0 or more layers are expected, "
                              f"not {self.bits} and {self.layers}")

    def patches(self, name: str) -> bool:
        """Is the tensor among the embeddings and first blocks?"""
        if self.layers is None:
            return True
        number = _BLOCK.search(name)
        return int(number[1]) < self.layers if number else bool(_FIRST.search(name))

    def change(self, task: Task, number: int) -> Task:
        known: dict[str, tuple[float, float]] = {}
        clean: dict[str, Reader] = {}            # of the tensor at hand: it is read once

        def patched(tau: Tensor, name: str, start: int) -> Tensor:
            if not self.patches(name):
                return torch.zeros_like(tau)
            if name not in known:
                known[name] = self._facts(task, name)
            along, size = known[name]
            if name not in clean:
                clean.clear()
                clean[name] = task.start(name)
            R = tau - along * clean[name](start, start + len(tau))
            return self.strength * self._stepped(R, size)

        return Changed(task, patched)

    def _facts(self, task: Task, name: str) -> tuple[float, float]:
        """(what of the change points along the weights, max|R|): ``R = tau - along theta_c``."""
        tau, clean, n = task.reader(name), task.start(name), task.shapes[name].numel()
        cuts = [(i, min(i + PIECE, n)) for i in range(0, n, PIECE)]
        norm = sum(float(clean(*c).square().sum()) for c in cuts)
        along = sum(float(tau(*c) @ clean(*c)) for c in cuts) / norm if norm else 0.0
        return along, max((float((tau(*c) - along * clean(*c)).abs().amax()) for c in cuts),
                          default=0.0)

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def _stepped(self, R: Tensor, size: float) -> Tensor:
        step = size / self.top                   # of 32 bits: far below what fp32 can tell
        return step * (R / step).round() if size else R

    def encode(self, task: Task) -> Coded:
        tensors = {}
        for name, shape in task.shapes.items():
            if not self.patches(name):
                continue
            along, size = self._facts(task, name)
            n = shape.numel()
            R = task.reader(name)(0, n) - along * task.start(name)(0, n)
            if not bool(R.isfinite().all()):
                raise ConfigError(f"{name} of the update holds inf or nan")
            if self.bits == 32:
                tensors[f"payload/{name}"] = R.float()
                continue
            q = (R / (size / self.top)).round() if size else R
            tensors[f"payload/{name}"] = packed((q + self.top).to(torch.uint8), self._width)
            tensors[f"scale/{name}"] = torch.tensor([size], dtype=torch.float64)
        return Coded(tensors, {})

    @property
    def _width(self) -> int:
        return next(w for w in (2, 4, 8) if w >= self.bits)

    def decode(self, coded: Coded, shapes: Mapping[str, torch.Size]) -> Task:
        return _Patch(self, coded, shapes)

    def lifecycle(self, base: Checkpoint, *tuned: Checkpoint) -> dict[str, Tensor]:
        """The clean checkpoint with the patches of the others."""
        tasks = [self.change(TaskVector(base, t), i) for i, t in enumerate(tuned)]
        return dict(combine(base, tasks, lambda taus, *_: taus.sum(0)))


class _Patch(Read):
    def __init__(self, how: Signature, coded: Coded, shapes: Mapping[str, torch.Size]):
        super().__init__(shapes)
        self.how, self.tensors = how, coded.tensors

    def values(self, name: str) -> Tensor:
        how, n = self.how, self.shapes[name].numel()
        if not how.patches(name):
            return torch.zeros(n)
        try:
            held = self.tensors[f"payload/{name}"]
            if how.bits == 32:
                return how.strength * held.view(n).double()
            size = float(self.tensors[f"scale/{name}"])
            q = unpacked(held, how._width, n).view(n).double() - how.top
        except (KeyError, RuntimeError):
            raise FormatError(f"the patch holds nothing of {name} that fits "
                              f"{list(self.shapes[name])}") from None
        return how.strength * (size / how.top) * q
