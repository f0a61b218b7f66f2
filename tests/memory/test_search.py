"""Processes that pay for a search."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

KILLED = """
import multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from burnish.memory.search import _ready
with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), _ready, (os.getpid(),)) as pool:
    print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
    pool.submit(time.sleep, 100)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(pid: int) -> bool:
    """No such process, or one that nobody has buried yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_workers_end_with_a_process_that_was_killed():
    if not sys.platform.startswith("linux"):
        return                                   # there are none elsewhere
    out = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in out.stdout.split()]
    assert pids and out.returncode < 0
    until = time.monotonic() + 20
    while not all(map(ended, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(ended, pids))


def test_one_whose_parent_is_another_ends_at_once(monkeypatch):
    from burnish.memory import search

    class Left(Exception):
        pass

    def leave(code):
        raise Left

    monkeypatch.setattr(search.os, "_exit", leave)
    monkeypatch.setattr(search.signal, "signal", lambda *a: None)
    monkeypatch.setattr(search.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *a: 0))
    with pytest.raises(Left):
        search._ready(search.os.getppid() + 1)
    search._ready(search.os.getppid())
