from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...blocks.tape import offload
from ...core.method import Method, setting

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Offload(Method):
    """Offload: what backward keeps waits in host memory or on disk.

    Every kept storage of at least `threshold` bytes moves once (deduplicated by storage, views
    rebuilt), weights never; backward brings it back. Gradients are bit-equal. It joins the lean
    tape (what is noted is not moved) and `checkpoint` (block inputs move).

    to="host" frees an accelerator's memory; where tensors are on the host already it changes
    nothing. to="disk" frees host memory too; bytes written per step are what backward keeps.
    """

    paper: ClassVar[str] = "SSDTrain (2024), arXiv:2408.10013 (the adaptive budget is not built)"

    small: ClassVar[dict[str, str]] = {"to": "disk"}

    to: Literal["host", "disk"] = setting("host", "where tensors wait")
    threshold: int = setting(offload.THRESHOLD, "bytes below which a tensor stays",
                             other=(1_000_000_000,))
    folder: str | None = setting(None, "for files; None: the system's temporary folder",
                                 unseen="which folder is no matter of numbers: "
                                        "tests/blocks/test_saved.py")

    def claims(self) -> tuple[str, ...]:
        return ("where kept tensors wait",)

    def activations(self, anatomy: Anatomy) -> OffloadSwitch:
        return OffloadSwitch(self)


@dataclass(frozen=True)
class OffloadSwitch:
    method: Offload

    def install(self, attacher: Any, part: Method) -> None:
        m = self.method
        attacher.state.tape.keep(offload.Offload(m.to, m.threshold, m.folder))
