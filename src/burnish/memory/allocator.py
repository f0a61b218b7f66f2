"""The C heap under PyTorch on Linux, and what the process really took.

glibc raises its mmap threshold each time a large block is freed, so big tensors move onto the
heap, where a freed block under a live one is never given back. The resident peak of a training
step on the CPU can double that way, in any library. Fixing the thresholds keeps every large tensor
in its own mapping, returned when freed: resident memory then follows what the ledger counts.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
THRESHOLD = 1 << 20


def steady_heap(threshold: int = THRESHOLD, arenas: int = 2) -> bool:
    """Fix glibc's thresholds for this process; call it before anything large is allocated.

    threshold: blocks from this many bytes on get a mapping of their own (1 MiB).
    arenas: heaps shared by all threads.
    Returns False where the C library has no ``mallopt`` (musl, macOS, Windows): nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    settings = ((_M_MMAP_THRESHOLD, threshold), (_M_TRIM_THRESHOLD, threshold),
                (_M_ARENA_MAX, arenas))
    return all([mallopt(key, value) == 1 for key, value in settings])


def trim() -> None:
    """Give free heap pages back to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def resident() -> int:
    """Bytes of this process in memory now (Linux), else its peak so far."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return _field(f.read(), "VmRSS")
    except OSError:
        return process_peak()


def process_peak() -> int:
    """The most bytes this process ever had in memory."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return _field(f.read(), "VmHWM")
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:                       # Windows
        return _windows_peak()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Start :func:`process_peak` afresh from what is resident now (Linux only)."""
    trim()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
        return True
    except OSError:
        return False


def _field(status: str, name: str) -> int:
    for line in status.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _windows_peak() -> int:
    class Counters(ctypes.Structure):
        _fields_ = [("cb", ctypes.c_ulong), ("faults", ctypes.c_ulong),
                    *[(n, ctypes.c_size_t) for n in ("peak", "now", "a", "b", "c", "d", "e", "f")]]

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    dll: Any = ctypes.windll                  # type: ignore[attr-defined]
    dll.psapi.GetProcessMemoryInfo(dll.kernel32.GetCurrentProcess(), ctypes.byref(counters),
                                   counters.cb)
    return int(counters.peak)
