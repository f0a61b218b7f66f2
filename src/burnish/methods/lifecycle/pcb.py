from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...blocks.choose.quantile import radix
from ...blocks.weight.checkpoints import Checkpoint
from ...blocks.weight.taskvector import Rule, Task, merged, together
from ...core.errors import ConfigError
from ...core.method import Method, setting

#: of all entries, the shares below and above which magnitudes are clamped
CLAMP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Pcb(Method):
    """PCB-Merging: entries of task vectors compete, inside a task and between tasks.

    T tasks, d entries each, ``tau_t = theta_t - theta_0``, ``N(x) = (x - min) / (max - min)`` over
    the d entries of one task (0 where all are equal). released: ``c_t`` is tau_t with magnitudes
    clamped at their 0.0001 and 0.9999 quantiles, ``a_t = exp(T N(|c_t|)^2)``,
    ``b_t = tanh(tau_t sum_u tau_u)``. paper: ``c_t = tau_t``, ``a_t = softmax(T N(tau_t^2))``,
    ``b_t = sum_u softmax(N(tau_t tau_u))``. Both: ``s_t = a_t b_t``; the floor(density d) largest
    of a task stay, ``w_t = N(max(s_t, the largest that does not))``, so conflicts are dropped and
    never flipped; ``theta = theta_0 + scale sum_t w_t c_t / max(sum_t w_t, 1e-12)``.

    Trains nothing. Quantiles and extremes are global and exact, in passes over the files, one
    tensor at a time (T tasks: 5 + 4 T reads of each; paper 3 + 4 T). Scores in fp32 or better:
    products of changes underflow in half precision. ``burnish combine`` is its command; ``--data``
    chooses the scale (0.8 to 1.8 in steps of 0.1). density is 0.1 in the released function; the
    paper's is about 0.2, which is unconfirmed, as are the details of its form here.
    """

    paper = "Parameter Competition Balancing for Model Merging (2024), arXiv:2410.02396"
    tier = "checked against an independent equation"
    grid = tuple(round(0.8 + 0.1 * k, 1) for k in range(11))

    density: float = setting(0.1, "share of each task's entries that counts", alias=("ratio", "r"))
    scale: float = setting(1.2, "lambda, what the merged change counts", alias=("lambda",))
    scoring: Literal["released", "paper"] = setting("released", "scores as the authors' code has "
                                                    "them, or their text")

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"pcb: density is a share, above 0 and at most 1, not {self.density}")

    def rule(self, tasks: Sequence[Task]) -> Rule:
        d = tasks[0].numel                       # all tasks merge the same tensors
        if d == 0:
            raise ConfigError("pcb: the task vectors have no tensor in common")
        score = self._released(tasks) if self.scoring == "released" else _paper(tasks)
        left = max(0, d - 1 - math.floor(round(self.density * d, 6)))

        def scores(t: int) -> Callable[[], Iterator[Tensor]]:
            return lambda: (score(rows)[1][t].float() for _, _, rows in together(tasks))

        least = _column(signed(scores(t), d, left) for t in range(len(tasks)))
        most = _column(max(float(p.amax()) for p in scores(t)()) for t in range(len(tasks)))

        def balanced(taus: Tensor, name: str, start: int) -> Tensor:
            c, s = score(taus)
            w = _between(s.float().double(), least.to(s.device), most.to(s.device)).clamp(min=0)
            return self.scale * (w * c).sum(0) / w.sum(0).clamp(min=1e-12)

        return balanced

    def _released(self, tasks: Sequence[Task]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        ends = [_ends(t) for t in tasks]
        low, high = _column(e[0] for e in ends), _column(e[1] for e in ends)

        def score(taus: Tensor) -> tuple[Tensor, Tensor]:
            lo, hi = low.to(taus.device), high.to(taus.device)
            size = taus.abs().clamp(lo, hi)
            a = (len(tasks) * _between(size, lo, hi).square()).exp()
            return taus.sign() * size, a * (taus * taus.sum(0)).tanh()

        return score

    def lifecycle(self, base: Checkpoint, *tuned: Checkpoint) -> dict[str, Tensor]:
        """The merged checkpoint."""
        return dict(merged(base, tuned, [self]))


def _ends(task: Task) -> tuple[float, float]:
    """Entries floor(0.0001 d) and ceil(0.9999 d) - 1 of the sorted magnitudes."""
    d = task.numel
    ks = math.floor(CLAMP * d), math.ceil((1 - CLAMP) * d) - 1
    low, high = (float(radix(lambda: (p.abs() for p in task.pieces()), d, k)[0]) for k in ks)
    return low, high


def _paper(tasks: Sequence[Task]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    many = len(tasks)

    def products(taus: Tensor) -> Tensor:        # (T, T, n)
        return taus.unsqueeze(0) * taus.unsqueeze(1)

    low = torch.full((many, many, 1), math.inf, dtype=torch.float64)
    high = -low
    for _, _, rows in together(tasks):
        both = products(rows).cpu()
        low = low.minimum(both.amin(-1, keepdim=True))
        high = high.maximum(both.amax(-1, keepdim=True))

    def grown(taus: Tensor) -> Tensor:
        return _between(products(taus), low.to(taus.device), high.to(taus.device)).exp()

    total = torch.zeros(many, many, 1, dtype=torch.float64)
    for _, _, rows in together(tasks):
        total += grown(rows).sum(-1, keepdim=True).cpu()

    def score(taus: Tensor) -> tuple[Tensor, Tensor]:
        inter = grown(taus)
        # what a softmax divides by is one number per task, which N takes out again
        intra = inter.diagonal().mT ** many
        return taus, intra * (inter / total.to(taus.device)).sum(1)

    return score


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64).unsqueeze(1)


def _between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """N of x, whose extremes are known."""
    return ((x - low) / (high - low)).where(high > low, 0)


def signed(stream: Callable[[], Iterator[Tensor]], n: int, k: int) -> float:
    """Entry k (from 0, ascending) of n fp32 values of either sign, exactly."""
    below = sum(int((p < 0).sum()) for p in stream())
    if k >= below:
        return float(radix(lambda: (p.clamp(min=0).abs() for p in stream()), n, k)[0])
    return -float(radix(lambda: ((-p).clamp(min=0).abs() for p in stream()), n, n - 1 - k)[0])
