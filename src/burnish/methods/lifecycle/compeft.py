from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...blocks.weight import golomb
from ...blocks.weight.checkpoints import Checkpoint
from ...blocks.weight.coded import Coded, Read
from ...blocks.weight.taskvector import Task, TaskVector, combine
from ...core.errors import ConfigError, FormatError
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Compeft(Method):
    """ComPEFT: an update as signs at its largest entries and one number for their size.

    ``tau = tuned - start`` over all n entries: the ``ceil(density n)`` largest ``|tau|`` stay (more
    only where magnitudes tie), ``tau' = alpha std(tau) sign(tau)`` there and 0 elsewhere; std is of
    all of tau. Of an adapter, the start is what its factors were before training, not zero.

    Size: ``density (b + 1 / (1 - (1 - density)^(2^b)) + 1)`` bits per parameter, Golomb codes of
    the gaps and a sign each (``blocks/weight/golomb.py``): 0.34 at 5 %, where the entropy is 0.336,
    47 times below 16 bits. Trains nothing; density and alpha are best chosen on held-out data
    (5 to 50 %, alpha 0.5 to 10); for models of 13B and more alpha 1 does without. Streamed: no
    flat copy. ``burnish compress`` and ``expand`` are its commands.
    """

    paper = "ComPEFT: Compression for Communicating Parameter Efficient Updates (2023), " \
            "arXiv:2311.13171"
    tier = "checked against the paper's numbers"

    density: float = setting(0.05, "share of the entries that stays", alias=("k",))
    alpha: float = setting(1.0, "size of an entry, in standard deviations of the update",
                           above=0.0)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError("compeft: density is a share, above 0 and at most 1, not "
                              f"{self.density}")

    def encode(self, task: Task) -> Coded:
        least, size = task.threshold(self.density), self.alpha * task.std()
        b = golomb.parameter(self.density)
        kept = (p.where(p.abs() >= least, 0) for p in task.pieces())
        unary, rest, count = golomb.encode(kept, b)
        return Coded({"payload/unary": unary, "payload/rest": rest,
                      "scale": torch.tensor([size], dtype=torch.float32)},
                     {"b": str(b), "count": str(count), "entries": str(task.numel)})

    def decode(self, coded: Coded, shapes: Mapping[str, torch.Size]) -> Task:
        return _Signs(coded, shapes)

    def lifecycle(self, base: Checkpoint, tuned: Checkpoint) -> dict[str, Tensor]:
        """The tuned checkpoint as it comes back."""
        task = TaskVector(base, tuned)
        back = self.decode(self.encode(task), task.shapes)
        back.tied = task.tied
        return dict(combine(base, [back], lambda taus, *_: taus[0]))


class _Signs(Read):
    """Entries in the order of the file; what is asked in that order is decoded once."""

    def __init__(self, coded: Coded, shapes: Mapping[str, torch.Size]):
        super().__init__(shapes)
        self.coded, self.size = coded, float(coded.tensors["scale"])
        self.starts, n = {}, 0
        for name, shape in shapes.items():
            self.starts[name] = n
            n += shape.numel()
        if n != coded.number("entries"):
            raise FormatError(f"the update is of {coded.number('entries')} entries, and the base "
                              f"has {n} there")
        self._again()

    def _again(self) -> None:
        t = self.coded.tensors
        self.stream: Iterator[tuple[Tensor, Tensor]] = golomb.decode(
            t["payload/unary"], t["payload/rest"], self.coded.number("b"),
            self.coded.number("count"))
        self.at = self.signs = torch.empty(0, dtype=torch.int64)
        self.passed = 0                          # places before it are decoded and gone

    def values(self, name: str) -> Tensor:
        start, stop = self.starts[name], self.starts[name] + self.shapes[name].numel()
        if start < self.passed:
            self._again()
        out = torch.zeros(stop - start)
        while True:
            here = (self.at >= start) & (self.at < stop)
            out[self.at[here] - start] = self.size * self.signs[here].float()
            if len(self.at) and int(self.at[-1]) >= stop:
                break
            if len(self.at):
                self.passed = int(self.at[-1]) + 1
            try:
                self.at, self.signs = next(self.stream)
            except StopIteration:
                break
            except ValueError as e:
                raise FormatError(f"the update is cut short: {e}") from None
        return out
