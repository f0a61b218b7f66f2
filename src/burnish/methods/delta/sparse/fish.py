from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ....blocks.choose import masks
from ....blocks.choose.largest import Largest, keep_largest
from ....blocks.weight.sparse import SparseDelta
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Fish(Method):
    """FISH mask: the entries with the largest Fisher information, wherever they are, once and for
    all.

    ``F_n = (1/N) sum_x (d log p(y|x) / d theta_n)^2`` over N = `samples` calibration samples, each
    in a pass of its own (the square of a batch's mean is another score), y its label; with
    ``sampled=True`` y is drawn from the model's own p(y|x), the true Fisher information, and no
    label is read. The k = density x (entries of all targets) largest train:
    ``W' = W + scatter(index, v)``; ``dv_k = sum_n g[n, o_k] x[n, i_k]``.

    Start: v = 0, the pre-trained function exactly. Trains k in all, as the scores fall: a matrix
    that has none is left alone. Kept for backward: x. Merges exactly; what is not chosen stays to
    the bit. The head trains beside it and is not of the budget.

    Reads data first: ``tune(..., calibration=batches)``. Squares are gathered on the host a round
    of matrices at a time, and of each at most k candidates go on; the device holds one gradient.
    The file holds the index, 4 bytes an entry: a load needs no data. Without data (a simulation)
    every matrix gets its share. A loss that is a mean over tokens weighs a sample by its length.
    That half a per cent and 1024 samples are right for any task is unconfirmed.
    """

    paper: ClassVar[str] = "Training Neural Networks with Fixed Sparse Masks (2021)"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    by_data: ClassVar[bool] = True
    small: ClassVar[dict[str, float]] = {"density": 0.1}

    density: float = setting(0.005, "share of the entries that train")
    sampled: bool = setting(False, "draw the labels from the model's own answer")
    samples: int = setting(1024, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.samples < 1:
            raise RecipeError("fish: density is in (0, 1] and samples at least 1, got "
                              f"{self.density} and {self.samples}")

    def read_loss(self, model: nn.Module, batch: Any, run: Callable[..., Any]) -> Tensor:
        if not self.sampled:
            return run(batch, loss=True)
        out = run(batch)
        logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            raise RecipeError("fish(sampled=True) draws labels from logits, which this model does "
                              "not give; sampled=False reads the loss of the labels there are")
        rows = logits.flatten(0, -2).float()
        return F.cross_entropy(rows, rows.detach().softmax(1).multinomial(1).squeeze(1),
                               reduction="sum")

    def observe(self, place: Place) -> Largest:
        return Largest(place.out, place.inp)

    def settle(self, seen: Mapping[Place, Any]) -> Mapping[Place, dict[str, Any]]:
        k = max(1, round(self.density * sum(p.numel for p in seen)))
        return {p: {"entries": n} for p, n in zip(seen, keep_largest(list(seen.values()), k),
                                                  strict=True)}

    def delta(self, site: Site) -> SparseDelta | None:
        place = site.place
        k = self.count(place, site.settled.get("entries"))
        index = masks.to_come(place, k) if site.seen is None else site.seen.index
        return SparseDelta(place, index.to(site.weight.device), portable=False, narrow=False) \
            if k else None

    def per_token(self, place: Place, entries: int | None = None) -> int:
        """Numbers kept per token besides the input."""
        return 0

    def count(self, place: Place, entries: int | None = None) -> int:
        """Trainable parameters on one matrix; without data: its share of the budget."""
        return max(1, round(self.density * place.numel)) if entries is None else entries
