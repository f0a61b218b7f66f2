"""Seconds of a step on a machine, from what the step does: a range, and where it comes from.

Counted are operations of products (16-bit ones apart), bytes read and written by products and by
everything else, and operators. With a machine's rates a step takes at least

    max(products / rate, their bytes / bandwidth) + other bytes / bandwidth

where arithmetic and traffic of products overlap wholly, and at most the sum of the three and of
the launches, where nothing overlaps (the shortest is no less than the launches either). Rates are
those that ``burnish doctor`` measured, or a maker's, which no program reaches: `PUBLISHED` says
what share of them is assumed. The whole steps that laboratories report, 46 % of the peak for PaLM
(arXiv:2204.02311) and 38 to 43 % for Llama 3 (arXiv:2407.21783), are products and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import BurnishError
from .gpus import Gpu, gpu
from .machine import MACHINES, machine

#: (least, most) share of the rates that large products, and everything else, reach
MEASURED = ((0.6, 1.0), (0.6, 1.0))
PUBLISHED = ((0.35, 0.8), (0.6, 0.95))
ASSUMED = ((0.2, 3.0), (0.2, 3.0))
#: seconds for an operator to be sent off, where nobody measured
LAUNCH = 5e-6


@dataclass(frozen=True)
class Rates:
    """single, half: operations/s in fp32 and in 16 bits; bandwidth: bytes/s; launch: seconds.
    products, sweeps: (least, most) share of those that is reached. known: are they this machine's?
    """

    name: str
    single: float
    half: float
    bandwidth: float
    launch: float
    products: tuple[float, float]
    sweeps: tuple[float, float]
    source: str
    known: bool = True

    def seconds(self, report: Any, accumulate: int = 1) -> tuple[float, float]:
        """(least, most) of an update of so many batches, of a report that counted."""
        low = high = 0.0
        for phase in report.flops:
            times = 1 if phase == "update" else accumulate
            a, b = self._phase(report, phase)
            low, high = low + times * a, high + times * b
        return low, high

    def _phase(self, report: Any, phase: str) -> tuple[float, float]:
        half, swept = report.half[phase], report.swept[phase]
        arithmetic = (report.flops[phase] - half) / self.single + half / self.half
        theirs = (report.traffic[phase] - swept) / self.bandwidth
        rest, sent = swept / self.bandwidth, report.launches[phase] * self.launch
        (p0, p1), (s0, s1) = self.products, self.sweeps
        low = max(arithmetic / p1, theirs / s1) + rest / s1
        return max(low, sent), arithmetic / p0 + (theirs + rest) / s0 + sent

    def to_dict(self) -> dict[str, Any]:
        return {"device": self.name, "single": self.single, "half": self.half,
                "bandwidth": self.bandwidth, "launch": self.launch, "products": self.products,
                "sweeps": self.sweeps, "source": self.source}


def rates(kind: str, card: Gpu | None = None) -> Rates:
    """The rates of a device type, or of a card: measured where ``burnish doctor`` did so."""
    from .doctor import kept

    found = kept(card.kind if card else kind)
    if found is not None and (card is None or _same(found["name"], card)):
        return Rates(found["name"], found["single"], found["half"], found["bandwidth"],
                     found["launch"], *MEASURED,
                     f"measured by burnish doctor on {found['date']}; a step's own products reach "
                     f"{MEASURED[0][0]:.0%} of that or more")
    card = card or _here(kind)
    if card is not None:
        (p0, p1), (s0, s1) = PUBLISHED
        return Rates(card.name, card.single, card.half, card.bandwidth, LAUNCH, *PUBLISHED,
                     f"published rates of {card.name}, of which {p0:.0%} to {p1:.0%} (products) "
                     f"and {s0:.0%} to {s1:.0%} (memory) are assumed to be reached; burnish doctor "
                     "on it measures them")
    rough = machine(kind)
    what = "two laptop cores" if rough is MACHINES["cpu"] else "a card of the A100 class"
    wish = "run burnish doctor" + ("" if kind == "cpu" else " there, or name the card with gpu=")
    return Rates(kind, rough.rate, rough.half_rate, rough.bandwidth, LAUNCH, *ASSUMED,
                 f"no rates of this machine: {what} {1 / ASSUMED[0][1]:.1g} to "
                 f"{1 / ASSUMED[0][0]:.0f} times as slow; {wish}", known=False)


def _here(kind: str) -> Gpu | None:
    """The card of this machine, where it is one of gpus.json."""
    import torch

    if kind != "cuda" or not torch.cuda.is_available():
        return None
    try:
        return gpu(torch.cuda.get_device_name())
    except BurnishError:
        return None


def _same(name: str, card: Gpu) -> bool:
    try:
        return gpu(name).name == card.name
    except BurnishError:
        return False
