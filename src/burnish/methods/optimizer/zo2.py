from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.blockwise import Blockwise
from ...blocks.weight.hosted import Hosted
from ...core.method import Method, setting
from ...core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Zo2(Method):
    """ZO2: MeZO with the weights of the blocks on the host, each brought once per probe.

        z ~ N(0, I)      g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)
        theta <- theta - lr (g z + wd theta)

    as in `mezo`, with its bits. Both evaluations run in step: a block comes to the device, runs at
    theta + eps z on the one state and at theta - eps z on the other, and goes; the next one comes
    meanwhile. The device holds the matrices of two blocks, whatever the depth, what is added to
    them, embeddings, norms, biases and the head, and the states of one block at both points.
    Matrices of blocks that train (`full`) are moved by the last update when their block comes next,
    or when anything reads them: evaluation, files, `p.detach()`. Outside of a step a weight comes
    while its layer reads it.

    Trains: nothing of its own. Refused with another storage of the blocks' matrices, and with a
    rounding that keeps a tensor beside weights that wait (kahan). The first update makes both
    evaluations in the plain way too and compares: a loss that reads more of the blocks than their
    last state is refused.

    Departures: embeddings, norms and biases of blocks stay on the device. Where something that
    trains stands before the blocks, their input at theta - eps z takes another run of what stands
    around them. On a CPU the host is the device, and only the order of the runs is another.
    """

    paper: ClassVar[str] = ("ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language "
                            "Models with Limited GPU Memory, 2025")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"one width"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "experts"})
    shown_beside: ClassVar[str] = "lora(rank=4)"

    eps: float = setting(1e-3, "radius of the probe; 1e-2 with LoRA, 1e-1 with prefixes")
    queries: int = setting(1, "probes averaged per update; each brings every block once")
    g_max: float = setting(0.0, "what |g| of a probe is cut to; 0: nothing is", other=(1e-4,))
    weight_decay: float = setting(
        0.0, "decay of matrices, times lr",
        unseen="nothing of a low-rank update decays: tests/methods/test_zo2.py")
    noise: Literal["device", "portable"] = setting(
        "device", "portable: the same z on every kind of device, about fifteen times slower")

    def claims(self) -> tuple[str, ...]:
        return ("the innermost rule",)

    def storage(self, site: Site) -> Hosted | None:
        return Hosted(site.weight) if self.waits(site.place) else None

    def waits(self, place: Place) -> bool:
        return place.block is not None and place.role != "head"

    def optimizer(self) -> Blockwise:
        return Blockwise(eps=self.eps, queries=self.queries, noise=self.noise,
                         weight_decay=self.weight_decay, bound=self.g_max)

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a trained tensor."""
        return 0
