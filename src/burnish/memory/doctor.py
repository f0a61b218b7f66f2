"""A machine's own rates, measured once in a few seconds and kept beside the cache of reports.

Products of square matrices (the best of sizes that take no longer than a moment), a copy larger
than caches, and the time an operator needs to be sent off. What is kept is used by plans, for the
same device, version of torch and number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cache import folder

#: one product is not made longer than this
MOMENT = 0.05
COPY = 1 << 28
FIGURES = ("single", "half", "bandwidth", "launch")


def name_of(kind: str) -> str:
    """What the device calls itself; with its threads on the CPU."""
    if kind == "cpu":
        import platform

        return f"{_processor() or platform.machine()}, {torch.get_num_threads()} threads"
    module = torch.get_device_module(kind)
    return str(module.get_device_name()) if hasattr(module, "get_device_name") else kind


def kept(kind: str) -> dict[str, Any] | None:
    """What was measured of this machine's device, by this version of torch; None: nothing yet."""
    try:
        data = json.loads(_file(kind).read_text("utf-8"))
        good = data["torch"] == torch.__version__ and isinstance(data["date"], str) and all(
            isinstance(data[f], float) and 0 < data[f] < math.inf for f in FIGURES)
        return data if good and data["name"] == name_of(kind) else None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError):
        return None


def measured(kind: str, again: bool = False, moment: float = MOMENT) -> dict[str, Any]:
    """The rates of this machine's device: what was kept, else (or `again`) measured and kept."""
    found = None if again else kept(kind)
    if found is not None:
        return found
    wait = torch.get_device_module(kind).synchronize if kind != "cpu" else lambda: None
    with torch.no_grad():
        data = {"kind": kind, "name": name_of(kind), "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "single": _products(torch.float32, kind, moment, wait),
                "half": max(_products(t, kind, moment, wait)
                            for t in (torch.bfloat16, torch.float16)),
                "bandwidth": _copy(kind, moment, wait), "launch": _launch(kind, wait)}
    with contextlib.suppress(OSError):         # a forbidden folder: measured again next time
        path = _file(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.time_ns()}.part")
        part.write_text(json.dumps(data), "utf-8")
        part.replace(path)
    return data


def _file(kind: str) -> Path:
    key = hashlib.sha256(f"{name_of(kind)} {torch.__version__}".encode()).hexdigest()[:16]
    return folder() / "machine" / f"{kind}-{key}.json"


def _products(dtype: torch.dtype, kind: str, moment: float, wait: Callable[[], Any]) -> float:
    """Operations a second of the best size."""
    best, n = 0.0, 256
    while True:
        a = torch.randn(n, n, device=kind).to(dtype)
        spent = _least(lambda a=a: a @ a, moment, wait)
        best = max(best, 2 * n**3 / spent)
        if spent * 8 > moment or n >= 8192:
            return best
        n *= 2


def _copy(kind: str, moment: float, wait: Callable[[], Any]) -> float:
    """Bytes a second, read and written."""
    a = torch.zeros(COPY // 4, device=kind)
    b = torch.zeros_like(a)
    return 2 * COPY / _least(lambda: b.copy_(a), 4 * moment, wait)


def _launch(kind: str, wait: Callable[[], Any]) -> float:
    """Seconds of an operator on one number, forward and backward."""
    count = 200

    def run() -> None:
        with torch.enable_grad():
            y = x = torch.ones(1, device=kind, requires_grad=True)
            for _ in range(count):
                y = y * x.detach()
            y.sum().backward()

    return _least(run, 0.1, wait) / (2 * count)


def _least(run: Callable[[], Any], moment: float, wait: Callable[[], Any]) -> float:
    """Seconds of the quickest of several runs that together take about a moment."""
    run()
    wait()
    best, end = math.inf, time.perf_counter() + moment
    while True:
        began = time.perf_counter()
        run()
        wait()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > end:
            return best


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    import platform

    return platform.processor()
