from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...blocks.choose.principal import Principal
from ...blocks.state.shortcut import sliced
from ...core.anatomy import Anatomy
from ...core.errors import ConfigError
from ...core.method import Method, setting
from ...core.stream import Stream, stream


@dataclass(frozen=True, kw_only=True)
class Slicegpt(Method):
    """SliceGPT: every sub-layer reads and writes in the principal directions of what it reads, and
    the last of them are cut off.

        H = sum over tokens of x^T x,  Q (d, k) its eigenvectors of the largest eigenvalues
        h' = h Q^T Q' + f(norm(h)),  k = (1 - ratio) d, down to a multiple of `multiple`

    x is the stream before an attention (basis Q), before an MLP (Q'), before the head. Readers are
    W Q, writers and tables Q^T W, a block's two shortcuts are (k, k); scales and shifts of norms
    move into the matrices that read them, which may gain a bias; LayerNorm becomes a root mean
    square, the mean having moved into what writes; a tied head is untied
    (``blocks/state/shortcut.py``). Each interface is read behind what has been cut before it::

        method = burnish.parse("slicegpt(ratio=0.25)")[0]
        lost = method.lifecycle(model, batches)      # in place, 128 of 2048 tokens as published
        tuned = burnish.tune(model, "lora(rank=8)")  # which makes it good

    A config has no word for its shapes: ``method.form(other)`` gives another copy of the base the
    same ones, for ``other.load_state_dict`` of the sliced model's tensors. Heads keep their width.

    Start: with ratio=0 the pre-trained function, in another basis. Trains nothing. Data run through
    one block at a time, their states on the host in between; H in fp64. Of a block with 4 d^2 and 3
    d m weights 4 d k + 3 k m + 2 k^2 are left. `turned` rotates what is kept by chance, the same
    function with no channel that is larger than the others.

    For models of one stack whose sub-layers have one norm before and none behind (Llama, Mistral,
    GPT-2, OPT); others are refused with the reason, before anything is changed. Published: plus a
    hundredth of H's mean diagonal on its diagonal, which moves no eigenvector.
    """

    paper: ClassVar[str] = ("SliceGPT: Compress Large Language Models by Deleting Rows and "
                            "Columns, ICLR 2024, arXiv:2401.15024")
    tier: ClassVar[str] = "checked against an independent equation"

    ratio: float = setting(0.25, "share of the channels that is taken out", alias=("sparsity",))
    multiple: int = setting(8, "the width that stays is a whole number of times this")
    turned: bool = setting(True, "rotate what is kept by chance")
    seed: int = setting(0, "of the rotations")

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1 or self.multiple < 1:
            raise ConfigError("slicegpt: a ratio from 0 and below 1 and a multiple of at least 1 "
                              f"are expected, got {self.ratio:g} and {self.multiple}")
        if self.targets is not None:
            raise ConfigError("slicegpt: the whole stream is sliced; targets do nothing")
        if not self.turned and "seed" in self.changed():
            raise ConfigError("slicegpt: seed does nothing beside turned=False")

    def width(self, d: int) -> int:
        """k."""
        k = int((1 - self.ratio) * d + 1e-9)
        k = k // self.multiple * self.multiple if self.ratio else d
        if k < 1:
            raise ConfigError(f"slicegpt(ratio={self.ratio:g}) leaves none of {d} channels in "
                              f"multiples of {self.multiple}")
        return k

    def _found(self, model: Any) -> tuple[Anatomy, Stream]:
        if not isinstance(model, nn.Module):
            raise ConfigError("slicegpt slices a plain model: merge the update first "
                              "(tuned.merge())")
        if any(hasattr(m, "burnish") for m in model.modules()):
            raise ConfigError("slicegpt slices a plain model, and a recipe is joined to this one: "
                              "merge or detach it first")
        anatomy = Anatomy.of(model)
        found = stream(anatomy, means=True)
        if isinstance(found, str):
            raise ConfigError("slicegpt: this model has no residual stream that can be turned: "
                              f"{found}")
        return anatomy, found

    @torch.no_grad()
    def lifecycle(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]
                  ) -> dict[str, float]:
        """Slices the model in place. By norm: the share of the eigenvalues' sum that was cut off
        before it."""
        anatomy, found = self._found(model)
        keep = self.width(found.width)
        bases = Principal(anatomy, found, keep, turned=self.turned, seed=self.seed, who="slicegpt")
        bases.read(batches)
        sliced(anatomy, found, keep, bases.bases)
        return dict(zip(found.norms, bases.lost, strict=True))

    def form(self, model: nn.Module) -> None:
        """Give a model these settings' shapes, in place, for values that a file brings."""
        anatomy, found = self._found(model)
        sliced(anatomy, found, self.width(found.width), None)
