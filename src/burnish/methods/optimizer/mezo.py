from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.zeroth import ZerothOrder
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Mezo(Method):
    """MeZO: two forwards per step, the noise from a seed, the memory of inference.

        z ~ N(0, I)      g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
        theta <- theta - lr (g z + wd theta)

    on the same batch, in eval mode, without gradients; E[g z] is the gradient as eps -> 0, and
    its squared norm is (d + 2) times the gradient's, hence learning rates of 1e-7 to 1e-6 for all
    weights, 1e-4 with LoRA. No state. z is drawn again from a counter stream (seed, tensor,
    element) wherever it is needed; theta +- eps z exists one module at a time and the stored
    weights are never perturbed. ``mode="in_place"`` is the published procedure: no scratch, but
    half-precision weights drift with every perturbation. bf16 weights are rounded stochastically
    unless the recipe says otherwise, since updates this small vanish under nearest rounding.

    Objectives of the recipe are evaluated at both points and added; tensors that a schedule keeps
    at rest (lisa) are neither perturbed nor moved; parts that read gradients (adalora, snella)
    are refused. Losses are evaluated in fp32 whatever the logits are held in. `g_max` cuts |g| of
    each probe, so that no step is longer than lr g_max ||z|| (QZO's clipping).

    The whole run is its starting weights and ``optimizer.log``: 16 bytes per query; ``replay``
    repeats it bit for bit. L may be any number, also one without a gradient.
    """

    paper: ClassVar[str] = "Fine-Tuning Language Models with Just Forward Passes, NeurIPS 2023"
    tier: ClassVar[str] = "checked against an independent equation"

    eps: float = setting(1e-3, "radius of the probe; 1e-2 with LoRA, 1e-1 with prefixes")
    queries: int = setting(1, "probes averaged per update, two forwards each")
    g_max: float = setting(0.0, "what |g| of a probe is cut to; 0: nothing is", other=(1e-4,))
    weight_decay: float = setting(0.0, "decay of matrices, times lr")
    mode: Literal["scratch", "in_place"] = setting("scratch", "where the perturbed weights live")
    noise: Literal["device", "portable"] = setting(
        "device", "portable: the same z on every kind of device, about fifteen times slower")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def optimizer(self) -> ZerothOrder:
        return ZerothOrder(eps=self.eps, queries=self.queries, mode=self.mode, noise=self.noise,
                           weight_decay=self.weight_decay, bound=self.g_max)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 0
