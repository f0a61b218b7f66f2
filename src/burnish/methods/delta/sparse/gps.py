from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....blocks.choose.contrast import features, supervised_contrast
from ....blocks.choose.observe import Gradient
from ....blocks.weight.sparse import SparseDelta
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Gps(Method):
    """GPS: of every neuron's inputs the few whose weights the loss pulls at most.

    ``W' = W + scatter(index, v)``: of each row of W (of each filter of a convolution) the `entries`
    columns with the largest |dL/dW|, the gradient's mean over `samples` calibration samples:
    ``tune(..., calibration=batches)``. ``dv_k = sum_n g[n, o_k] x[n, i_k]``; no gradient of W's
    size is made while training, and optimizer state is that of v.

    Start: v = 0, the pre-trained function exactly. Trains entries x out per matrix: ViT-B/16
    82,944 with one. Kept for backward: x. Merges exactly. The file holds the index, 4 bytes an
    entry: a load needs no data. While data is read the host holds a round of gradients, the device
    one.

    The paper reads the gradients of a supervised contrastive loss on what enters the head, so that
    no head is needed: ``contrast=True``, for heads that classify whole samples and batches with
    several samples of a class. Here the default is the task's own loss, as every model has it.
    """

    paper: ClassVar[str] = "Gradient-based Parameter Selection for Efficient Fine-Tuning (2024)"
    tier: ClassVar[str] = "checked against an independent equation"
    small: ClassVar[dict[str, int]] = {"entries": 2}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    entries: int = setting(1, "K, entries of each row that train", alias=("K",))
    contrast: bool = setting(
        False, "read the gradients of a contrastive loss on features, not of the task's",
        unseen="a batch of two has no two samples of a class: tests/methods/test_gps.py")
    temperature: float = setting(
        0.07, "of the contrastive loss",
        unseen="a batch of two has no two samples of a class: tests/methods/test_gps.py")
    samples: int | None = setting(None, "samples to read at most; None: all there are",
                                  other=(1,))

    def __post_init__(self) -> None:
        if self.entries < 1 or self.samples is not None and self.samples < 1:
            raise RecipeError("gps: entries and samples are at least 1, got "
                              f"{self.entries} and {self.samples}")
        if self.temperature <= 0 or not self.contrast and "temperature" in self.changed():
            raise RecipeError(f"gps: temperature={self.temperature} is positive, and does nothing "
                              "beside contrast=False")

    def read_loss(self, model: nn.Module, batch: Any, run: Callable[..., Any]) -> Tensor:
        if not self.contrast:
            return run(batch, loss=True)
        return supervised_contrast(*features(model, batch, run), self.temperature)

    def observe(self, place: Place) -> Gradient:
        return Gradient(place.out, place.inp)

    def delta(self, site: Site) -> SparseDelta:
        place = site.place
        if self.entries > place.inp:
            raise RankError(f"gps: {self.entries} entries do not fit a row of {place.name}, which "
                            f"has {place.inp}")
        if site.seen is None:                            # a file brings it, or nothing has values
            columns = torch.arange(self.entries).expand(place.out, -1)
        else:
            columns = site.seen.value.abs().topk(self.entries, 1).indices
        index = columns + place.inp * torch.arange(place.out).unsqueeze(1)
        return SparseDelta(place, index.flatten().to(site.weight.device), portable=False,
                           narrow=False)

    def per_token(self, place: Place) -> int:
        """Numbers kept per token besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.entries * place.out
