"""Rough machines for relative time: an operator takes what its arithmetic or its traffic takes.

    seconds = max(operations / rate, bytes / bandwidth) + launch

Only ratios between recipes on one machine are used, so round figures do; they are stated here and
nowhere else. A copy between devices runs at the link's speed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """rate: operations/s in fp32; half_rate: in 16 bits; bandwidth, link: bytes/s; launch: s."""

    rate: float
    half_rate: float
    bandwidth: float
    link: float
    launch: float

    def seconds(self, operations: float, traffic: float, itemsize: int, crosses: bool) -> float:
        rate = self.half_rate if itemsize <= 2 else self.rate
        width = self.link if crosses else self.bandwidth
        return max(operations / rate, traffic / width) + self.launch


#: two laptop cores (16-bit products gain nothing there); a data-centre card of the A100 class
MACHINES = {
    "cpu": Machine(1e11, 1e11, 2e10, 2e10, 2e-6),
    "cuda": Machine(6e13, 2e14, 1.5e12, 2e10, 4e-6),
}


def machine(device: str) -> Machine:
    """The machine for a device type; other accelerators are taken as cuda's."""
    return MACHINES["cpu" if device in ("cpu", "meta") else "cuda"]
