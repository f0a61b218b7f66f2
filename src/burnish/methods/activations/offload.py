from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ...blocks.state.prompts import Listener
from ...blocks.tape import offload
from ...core.errors import RecipeError
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Offload(Method):
    """Offload: what backward keeps waits in host memory or on disk.

    Every kept storage of at least `threshold` bytes moves once (deduplicated by storage, views
    rebuilt), weights never. It is gathered by block: when a block begins, threads write what the
    one before it keeps, which leaves memory as the block fills it; backward of a block reads back
    what the one before it keeps. So one block's worth and a quarter stands in memory. The last
    block is never written. Gradients are bit-equal. It joins the lean tape (what is noted is not
    moved) and `checkpoint` (block inputs move; what runs again in backward stays).

    in_time=True times forwards 2 and 3. With bytes V_n and time t_n of block n, T = sum t and
    the disk's bandwidth, everything from the first n on for which

        (sum_{i<n} V_i + 2 V_n) / (3 T - 2 sum_{i<n} t_i) > bandwidth

    stays in memory from then on: a step is not slowed, and takes up to the memory it takes without
    offload, which is what `simulate` promises of it.

    to="host" frees an accelerator's memory; where tensors are on the host already it changes
    nothing. to="disk" frees host memory too; bytes written per step are what backward keeps. The
    file has no name, so nothing is left of it however a run ends. A disk that is full or fails
    stops the step with an error. A compiled model runs uncompiled, and says so.

    Departure: copies between an accelerator and the host wait for each other on one stream.
    """

    paper: ClassVar[str] = "SSDTrain (2024), arXiv:2408.10013"

    small: ClassVar[dict[str, str]] = {"to": "disk"}

    to: Literal["host", "disk"] = setting("host", "where tensors wait")
    threshold: int = setting(offload.THRESHOLD, "bytes below which a tensor stays",
                             other=(1_000_000_000,))
    folder: str | None = setting(None, "for the file; None: the system's temporary folder",
                                 unseen="which folder is no matter of numbers: "
                                        "tests/blocks/test_offload.py")
    in_time: bool = setting(False, "write no more than the disk takes in the time of a step",
                             unseen="it acts by what a disk can do: tests/blocks/test_offload.py")

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.in_time and self.to == "host":
            raise RecipeError(f"offload(threshold={self.threshold}, to={self.to!r}, in_time="
                              f"{self.in_time}): 0 bytes or more, and a disk for in_time")

    def claims(self) -> tuple[str, ...]:
        return ("where kept tensors wait",)

    def activations(self, anatomy: Anatomy) -> OffloadSwitch:
        return OffloadSwitch(self, tuple(b.path for b in anatomy.blocks))


@dataclass(frozen=True)
class OffloadSwitch:
    method: Offload
    blocks: tuple[str, ...]

    def install(self, attacher: Any, part: Method) -> None:
        m = self.method
        attacher.state.tape.keep(offload.Offload(m.to, m.threshold, m.folder, m.in_time))
        for path in self.blocks:
            Begins(attacher.state, attacher.adapter.name).listen(attacher.slot(path), part.name)


class Begins(Listener):
    """Tells the policy that a block begins."""

    changes = False

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        self.state.tape.policy.enter()
        return call(*args, **kw)

    def check(self, call: Any) -> None:
        pass                                     # whatever adapters are in use
