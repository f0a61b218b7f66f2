from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...blocks.weight.checkpoints import Checkpoint, facts
from ...blocks.weight.spectrum import Leading, leading
from ...core.errors import ConfigError
from ...core.method import Method, setting


def looked_at(base: Checkpoint, tuned: Checkpoint, top: int = 10,
              transposed: Callable[[str], bool] = lambda name: False
              ) -> Iterator[tuple[str, Leading]]:
    """The leading directions of every matrix that differs, one matrix at a time.

    transposed: names of weights that are stored (in, out), as GPT-2's.
    """
    for name in tuned:
        if name not in base or facts(tuned, name).dim() != 2 \
                or not facts(tuned, name).is_floating_point() \
                or facts(base, name).shape != facts(tuned, name).shape:
            continue
        W0, W1 = base[name], tuned[name]
        if W0.dtype == W1.dtype and bool((W0 == W1).all()):
            continue
        yield name, leading(W0.t(), W1.t(), top) if transposed(name) else leading(W0, W1, top)


@dataclass(frozen=True, kw_only=True)
class Intruders(Method):
    """Intruder dimensions: leading directions of a tuned weight that its base does not have.

    ``c_j = max_i |<u_j, u0_i>|``, u_j the first `leading` left singular vectors of the tuned weight
    (out, in), u0_i all of the base's; u_j is an intruder where ``c_j < likeness``. Their number
    goes with what is forgotten. The lifecycle scales them: ``W = W1 + (keep - 1) sum_j s_j u_j
    v_j^T`` over the intruders; keep = 1 changes nothing, 0 takes them out.

    Trains nothing. In fp32 whatever the weights are; vectors of values that tie count as a space
    (spectrum.py). Cost: one complete decomposition of each base matrix that was tuned, and the
    leading directions of the tuned one; one matrix at a time. An update of rank r that is scaled so
    has rank r + intruders at most (:meth:`Leading.pair`). ``burnish inspect --intruders`` counts.
    """

    paper = "LoRA vs Full Fine-tuning: An Illusion of Equivalence (2024), arXiv:2410.21228"
    tier = "checked against an independent equation"

    leading: int = setting(10, "leading directions looked at in each matrix")
    likeness: float = setting(0.5, "largest cosine of an intruder with the base's directions")
    keep: float = setting(0.75, "what intruders count afterwards; 1 leaves them, 0 takes them out")

    def __post_init__(self) -> None:
        if self.leading < 1 or not 0 < self.likeness < 1 or not 0 <= self.keep <= 1:
            raise ConfigError("intruders: leading >= 1, a likeness between 0 and 1 and keep from 0 "
                              "to 1 are expected")

    def lifecycle(self, base: Checkpoint, tuned: Checkpoint, **about: Any) -> dict[str, Tensor]:
        """The tuned checkpoint with its intruders scaled. about: as of :func:`looked_at`."""
        out = {n: tuned[n] for n in tuned}
        if self.keep == 1:
            return out
        transposed = about.get("transposed", lambda name: False)
        for name, found in looked_at(base, tuned, self.leading, **about):
            A, B = found.pair(self.likeness, self.keep)
            if len(A):
                change = (B @ A).t() if transposed(name) else B @ A
                out[name] = (out[name].to(change) + change).to(out[name].dtype)
        return out
