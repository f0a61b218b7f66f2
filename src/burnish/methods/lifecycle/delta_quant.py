from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...blocks.tape.codes import packed, unpacked
from ...blocks.weight.checkpoints import Checkpoint
from ...blocks.weight.coded import Coded, Read
from ...blocks.weight.taskvector import Task, TaskVector, combine
from ...core.errors import ConfigError, FormatError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class DeltaQuant(Method):
    """Delta quantisation: the difference of a tuned weight in few bits.

    bits >= 2: groups of `group` entries along the input, ``s = max|Delta| / Q`` (fp16, rounded up),
    ``Q = 2^(bits - 1) - 1``, ``Delta' = s round(Delta / s)``: within -Q..Q, off by s / 2 at most.
    bits = 1 (BitDelta): ``Delta' = a sign(Delta)``, ``a = mean|Delta|`` of a matrix, the best of
    all a; sign(0) is +1. Rows shorter than a group (of a thin factor) are taken as one. Matrices
    alone; vectors and what `whole` names stay in bf16.

    Size: bits + 16 / group bits per weight (4.25 by default). Trains nothing; a is not distilled
    further. One tensor at a time. ``burnish compress`` and ``expand`` are its commands.
    """

    paper = "BitDelta (2024), arXiv:2402.10193; the groups are common practice"
    tier = "checked against an independent equation"

    bits: Literal[1, 2, 4, 8] = setting(4, "of an entry; 1 keeps signs alone")
    group: int = setting(64, "entries with one scale, along the input")
    whole: tuple[str, ...] = setting(("embed", "wte", "wpe", "lm_head", "classifier", "head"),
                                     "parts of names that stay in 16 bits")

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ConfigError(f"delta_quant: a group has 1 entry or more, not {self.group}")

    def _coded(self, name: str, shape: torch.Size) -> bool:
        return len(shape) > 1 and not any(w in name for w in self.whole)

    def _lead(self, shape: torch.Size) -> int:
        """Rows that have scales of their own."""
        return shape[0] if shape[1:].numel() >= self.group else 1

    def encode(self, task: Task) -> Coded:
        tensors = {}
        for name, shape in task.shapes.items():
            tau = task.tensor(name, torch.float64)
            if not bool(tau.isfinite().all()):
                raise ConfigError(f"{name} of the update holds inf or nan")
            if not self._coded(name, shape):
                tensors[f"payload/{name}"] = tau.to(torch.bfloat16)
                continue
            rows = tau.view(self._lead(shape), -1)
            if self.bits == 1:
                scale = rows.abs().mean().float().view(1)
                q = (rows >= 0).to(torch.uint8)
            else:
                top = 2 ** (self.bits - 1) - 1
                parts = pad(rows, (0, -rows.shape[1] % self.group)).unflatten(1, (-1, self.group))
                scale = _up(parts.abs().amax(-1) / top)
                steps = (parts / scale.double().unsqueeze(-1)).nan_to_num(0)       # 0 / 0
                q = (steps.round() + top).flatten(1)[:, :rows.shape[1]]
            tensors[f"payload/{name}"] = packed(q.to(torch.uint8).flatten(), self.bits)
            tensors[f"scale/{name}"] = scale
        return Coded(tensors, {})

    def decode(self, coded: Coded, shapes: Mapping[str, torch.Size]) -> Task:
        return _Steps(self, coded, shapes)

    def lifecycle(self, base: Checkpoint, tuned: Checkpoint) -> dict[str, Tensor]:
        """The tuned checkpoint as it comes back."""
        task = TaskVector(base, tuned)
        back = self.decode(self.encode(task), task.shapes)
        back.tied = task.tied
        return dict(combine(base, [back], lambda taus, *_: taus[0]))


class _Steps(Read):
    def __init__(self, how: DeltaQuant, coded: Coded, shapes: Mapping[str, torch.Size]):
        super().__init__(shapes)
        self.how, self.tensors = how, coded.tensors

    def values(self, name: str) -> Tensor:
        shape, how = self.shapes[name], self.how
        try:
            held = self.tensors[f"payload/{name}"]
            if not how._coded(name, shape):
                return held.reshape(shape).flatten().double()
            scale = self.tensors[f"scale/{name}"].double()
            lead = how._lead(shape)
            q = unpacked(held, how.bits, shape.numel()).view(lead, shape.numel() // lead).double()
            if how.bits == 1:
                return (scale * (2 * q - 1)).flatten()
            q -= 2 ** (how.bits - 1) - 1
            return (q * scale.repeat_interleave(how.group, 1)[:, :q.shape[1]]).flatten()
        except (KeyError, RuntimeError):
            raise FormatError(f"the update holds nothing of {name} that fits "
                              f"{list(shape)}") from None


def _up(scale: Tensor) -> Tensor:
    """fp16, never below: an entry at the end of the grid is no farther off than any."""
    half = scale.half()
    return torch.where(half.double() < scale, torch.nextafter(
        half, torch.full_like(half, torch.inf)), half)
