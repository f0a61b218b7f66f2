from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...blocks.choose.transport import Plan, exchanged, potentials
from ...blocks.state.taps import evaluating
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ._adapted import Read, module_of, untargeted
from ._choosing import Chooses

#: rows of the pool whose distances exist at once
BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Goracs(Chooses, Method):
    """GORACS: a set of rows that as a whole lies where the wanted rows lie, and asks for little.

        min over S, |S| = n:   OT(S, V) + alpha mean_{s in S} ||dL_s||

    OT is optimal transport between the rows of S and the wanted rows V, each as heavy as the other
    rows of its set, with C_ij the Euclidean distance of embeddings plus ``gap`` for rows of unlike
    class (where rows have one class each); ||dL_s|| is the length of a row's gradient (that the
    bound's second term is this, and its weight, are unconfirmed). Two steps:

        begin     v of OT between all rows and V (Sinkhorn); the n rows of least
                  u(x) + alpha ||dL_x||,  u(x) = min_j (C_xj - v_j)
        exchange  the row of S with the largest u_s + alpha ||dL_s|| for the least one outside,
                  kept where the objective falls; OT is exact. It ends after `patience` exchanges
                  that were not kept, or where the potentials prove that none can help.

    A row's embedding is what the base (what was added is off) hands its head, of several tokens
    their mean over those that the attention mask counts, or what `features` makes of its outputs.
    Gradients are of what trains, where it stands: a fresh adapter's, or that of a run.

    ``burnish select RUN DATA --like FILE --how "goracs(coreset=500)"``, and by hand::

        scores = burnish.parse("goracs(coreset=500)")[0].lifecycle(tuned, [], rows, {"": wanted})

    Scores are (rows,): 0 for a row that is not in S, and for those that are from 1 down to 1 / n by
    how well they stand there. Trains nothing. A forward and a backward for each row; n m numbers
    several times over in exchanges, and of the pool's distances ``4096 m`` at a time.
    """

    paper: ClassVar[str] = "GORACS: Group-level Optimal Transport-guided Coreset Selection (2025)"
    tier: ClassVar[str] = "checked against an independent equation"

    coreset: int = setting(1024, "n, rows that are chosen")
    alpha: float = setting(1.0, "of the gradient term")
    gap: float = setting(1.0, "distance between classes, in mean distances of rows")
    patience: int = setting(20, "exchanges in a row that were not kept, and then it is over")

    def __post_init__(self) -> None:
        untargeted(self, "gradients are of what trains")
        if self.coreset < 1 or self.patience < 0 or min(self.alpha, self.gap) < 0:
            raise ConfigError("goracs: a coreset of at least 1, and a patience, an alpha and a gap "
                              f"of at least 0 are expected, got {self.coreset}, {self.patience}, "
                              f"{self.alpha:g} and {self.gap:g}")

    def lifecycle(self, tuned: Any, points: Sequence[Any], rows: Iterable[Any],
                  wanted: Mapping[str, Iterable[Any]], loss: Callable[..., Tensor] | None = None,
                  say: Callable[[str], None] = lambda line: None,
                  features: Callable[[Any], Tensor] | None = None) -> Tensor:
        """(rows,) scores, above 0 for the chosen. `points` are not read."""
        read = Read("goracs", tuned, features)
        E, classes, steep = self._pool(tuned, read, rows, loss)
        V, theirs, _ = self._pool(tuned, read, (b for some in wanted.values() for b in some),
                                  lengths=False)
        if not len(V):
            raise ConfigError("goracs: wanted rows are needed")
        if not self.coreset <= len(E):
            raise ConfigError(f"goracs: coreset={self.coreset}, and there are {len(E)} rows")
        extra, far = self.alpha * steep, self._distances(E, V, classes, theirs)
        v = potentials(lambda a, b: far(torch.arange(a, b)), len(E), BLOCK)
        first = torch.cat([(far(part) - v).min(1).values
                           for part in torch.arange(len(E)).split(BLOCK)]) + extra
        inside = first.sort().indices[:self.coreset].tolist()
        plan = Plan(far(torch.tensor(inside)))
        begun = plan.value + float(extra[inside].mean())
        done = exchanged(plan, inside, far, extra, self.patience, BLOCK)
        say(f"{self.coreset} of {len(E)} rows: the objective went from {begun:.6g} to {done:.6g}")
        scores = torch.zeros(len(E))
        best = sorted(range(self.coreset), key=lambda k: plan.u[k] + float(extra[inside[k]]))
        for place, k in enumerate(best):
            scores[inside[k]] = 1 - place / self.coreset
        return scores

    def chosen(self, scores: Tensor) -> list[int]:
        """Numbers of the rows of S, the best first."""
        order = scores.sort(descending=True).indices
        return order[:int((scores > 0).sum())].tolist()

    def _distances(self, E: Tensor, V: Tensor, classes: Tensor, theirs: Tensor
                   ) -> Callable[[Tensor], Tensor]:
        """rows -> C of them, in fp64."""
        def plain(index: Tensor) -> Tensor:
            return torch.cdist(E[index], V, compute_mode="donot_use_mm_for_euclid_dist")

        told = bool((classes >= 0).all() and (theirs >= 0).all())
        if not (told and self.gap):
            return plain
        some = torch.arange(len(E))[:: max(1, len(E) // BLOCK)]
        gap = self.gap * float(plain(some).mean())
        return lambda index: plain(index) + gap * (classes[index].unsqueeze(1) != theirs)

    def _pool(self, tuned: Any, read: Read, rows: Iterable[Any],
              loss: Callable[..., Tensor] | None = None, lengths: bool = True
              ) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, width) embeddings, (rows,) classes or -1, (rows,) lengths of gradients."""
        found, classes, steep = [], [], []
        off = getattr(tuned, "disabled", contextlib.nullcontext)
        with evaluating(list(module_of(tuned).modules())):
            for batch in rows:
                with torch.no_grad(), off():
                    found.append(read.of(batch).double().cpu())
                label = batch.get("labels") if isinstance(batch, Mapping) else None
                classes.append(int(label) if isinstance(label, Tensor) and label.numel() == 1
                               and not label.is_floating_point() else -1)
                if self.alpha and lengths:
                    grads = tuned.probe(batch, loss).grads.values()
                    steep.append(sum(float(g.double().square().sum()) for g in grads) ** 0.5)
                else:
                    steep.append(0.0)
        return (torch.cat(found) if found else torch.zeros(0), torch.tensor(classes),
                torch.from_numpy(np.array(steep)))
