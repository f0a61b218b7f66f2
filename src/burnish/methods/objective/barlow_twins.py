from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ...blocks.state.prompts import accepts
from ...blocks.state.twins import barlow, view
from ...core.errors import RecipeError
from ...core.method import INPUT, Method, setting
from ...core.needs import head_linear

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class BarlowTwins(Method):
    """Barlow Twins: two views of a sample are to be the same embedding, of numbers that each say
    something of their own.

        loss + weight ( sum_i (1 - C_ii)^2 + redundancy sum_i sum_{j != i} C_ij^2 )
        C_ij = mean_b a_bi b_bj

    a, b (B, D) what the head reads of the two views, each number at mean 0 and deviation 1 over
    the batch. A view is the batch distorted (blocks/state/twins.py): pictures are cut out and
    change contrast and brightness, of tokens some do not count, other numbers are those of another
    sample, each by `distortion`. With ``both=False`` one view is the batch as it is, and a forward
    less. The draws of an update are those of its number.

    Beside what trains the encoder (``lora(rank=8) + barlow_twins``), where rows are few or their
    labels poor; rows that are pairs already: `burnish fit` of texts with ``loss_type="barlow"``.
    Trains nothing of its own, keeps a batch's states of each view for backward. Start: the term
    has a gradient from the first step. C is of one process's micro-batch: 32 samples and more, for
    of two it is +1 or -1 whatever they are. Not for models that read each token's own head.

    Departures: no projector (8192 wide, thrown away after pre-training) between features and C, so
    redundancy falls in what the head reads; no mirror images. 0.0051 and 0.024 are the authors'
    code's (unconfirmed).
    """

    paper: ClassVar[str] = ("Barlow Twins: Self-Supervised Learning via Redundancy Reduction, "
                            "ICML 2021, arXiv:2103.03230")
    needs: ClassVar[frozenset[str]] = frozenset({"linear head"})
    sees_run: ClassVar[bool] = True
    #: of two samples C is all signs
    small: ClassVar[Mapping[str, Any]] = {"eps": 1.0, "weight": 1.0}

    weight: float = setting(0.024, "of the term")
    redundancy: float = setting(0.0051, "lambda, of the pairs of numbers", alias=("lambd",),
                                other=(1.0,))
    distortion: float = setting(0.3, "how far a view is from the sample, up to 1")
    both: bool = setting(True, "both views are distorted, not one of them alone")
    eps: float = setting(1e-5, "added to each variance", other=(0.1,))
    seed: int = setting(0, "of the views")

    def __post_init__(self) -> None:
        if min(self.weight, self.eps) <= 0 or self.redundancy < 0 or not 0 < self.distortion < 1:
            raise RecipeError("barlow_twins: weight and eps above 0, redundancy of at least 0 and "
                              f"distortion between 0 and 1 are expected, got {self.weight}, "
                              f"{self.eps}, {self.redundancy} and {self.distortion}")

    def taps(self, anatomy: Anatomy) -> tuple[str, ...]:
        head = head_linear(anatomy)
        return () if head is None else (f"{head.path}{INPUT}",)

    def objective(self, tuned: Tuned, run: Any) -> Iterator[Tensor]:
        (path,) = self.taps(tuned.anatomy)
        masked, step = accepts(tuned.model, "attention_mask"), tuned.timeline.step
        draw = random.Random(f"barlow_twins {self.seed} {step}")
        seen = [] if self.both else [run.taps[path]]
        while len(seen) < 2:
            _, taps = run.once_more(lambda args, kw: view(args, kw, self.distortion, masked,
                                                          draw.getrandbits(31)))
            seen.append(taps[path])
        yield self.weight * barlow(*map(pooled, seen), self.redundancy, self.eps)


def pooled(h: Tensor) -> Tensor:
    """(B, D): what a head of each sample reads, which some do at more places than one."""
    return h if h.dim() == 2 else h.flatten(1, -2).mean(1)
