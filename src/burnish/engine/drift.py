"""Does a merged weight answer as the tuned layer did? Asked of every layer on a few inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..core.errors import CheckError
from .layout import is_conv1d
from .slot import Slot, slots

if TYPE_CHECKING:
    from .tuned import Tuned

#: inputs per layer
SAMPLES = 4
#: largest difference, as a share of the largest output: what rounding the weight once may do
#: (factors are fp32 whatever the weight is)
BOUND = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Drift:
    """Outputs of the touched layers before a merge, to be compared with those after it."""

    def __init__(self, tuned: Tuned):
        self.rows = [(path, module, x, _run(module, x)) for path, module, slot in
                     slots(tuned.model) if (x := _input(module, slot)) is not None]

    def check(self) -> None:
        """Raises CheckError naming the layer that answers otherwise now."""
        for path, module, x, before in self.rows:
            after = _run(module, x)
            most = before.abs().amax()
            least = (after.to(before.dtype) - before).abs().amax()
            if isinstance(most, FakeTensor):             # a simulation has no values to compare
                continue
            off = float(least) / max(float(most), 1e-30)
            bound = BOUND.get(x.dtype if x.is_floating_point() else before.dtype, 1e-3)
            if not off <= bound:
                raise CheckError(
                    f"cannot merge: {path} answers otherwise once its update is in its weight (by "
                    f"{off:.2g} of its largest output, {bound:.2g} is what {before.dtype} rounds "
                    "away): its forward does not read the weight as it stands; nothing was changed")


def _input(module: nn.Module, slot: Slot) -> Tensor | None:
    """A few inputs the layer takes, always the same; None for what cannot be run by itself."""
    if not (slot.parts or slot.providers) or slot.root or slot.mode or slot.listeners \
            or slot.reads or any(p.branch and p.branch.read[0] not in ("", slot.path)
                                 for p in slot.parts):
        return None
    if isinstance(module, nn.Linear) or is_conv1d(module):
        shape = [SAMPLES, module.in_features if isinstance(module, nn.Linear) else module.nx]
    elif isinstance(module, nn.modules.conv._ConvNd):
        sides = [(k - 1) * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        shape = [SAMPLES, module.in_channels, *sides]
    elif isinstance(module, nn.Embedding):
        return torch.arange(min(SAMPLES, module.num_embeddings), device=module.weight.device)
    else:
        return None
    weight = slot._stored(module, "weight")
    if not weight.is_floating_point():
        return None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(weight.device, weight.dtype)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            return module(x)
    finally:
        for m, was in modes.items():
            m.training = was
