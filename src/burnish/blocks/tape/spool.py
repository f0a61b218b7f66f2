"""A file without a name that holds bytes for a while, and the threads that fill and read it.

The file is unlinked as soon as it is open, so whatever ends the process (an error, Ctrl-C, a kill)
leaves nothing on the disk. Space is handed out in runs of bytes; one that is given back serves the
next run of its length, and when all are back the file is cut to nothing.

Threads move bytes between the file and memory that their caller owns, and touch nothing of torch.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ...core.errors import BurnishError, RecipeError

#: threads that move bytes: one is written while another is read
WORKERS = 2
clock = time.perf_counter


class Spool:
    """Runs of bytes in one file. RecipeError where no file can be made.

    written, busy: bytes that were written, and the seconds in which any write was under way.
    """

    def __init__(self, folder: str | None = None):
        try:
            self.file = tempfile.TemporaryFile(prefix="burnish-", dir=folder, buffering=0)
        except OSError as e:
            raise RecipeError(f"kept tensors cannot wait in {folder or tempfile.gettempdir()}: "
                              f"{e.strerror or e}; choose another folder") from None
        weakref.finalize(self, self.file.close)
        self.folder = folder or tempfile.gettempdir()
        self.written, self.busy = 0, 0.0
        self._free: dict[int, list[int]] = {}        # length -> where runs begin
        self._out = self._end = self._writing = 0
        self._since = 0.0
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def reserve(self, nbytes: int) -> int:
        """Where `nbytes` may be written."""
        with self._lock:
            self._out += 1
            if self._free.get(nbytes):
                return self._free[nbytes].pop()
            self._end += nbytes
            return self._end - nbytes

    def give_back(self, at: int, nbytes: int) -> None:
        """A run is of no use any more."""
        with self._lock:
            self._out -= 1
            self._free.setdefault(nbytes, []).append(at)
            if not self._out:
                self._free.clear()
                self._end = 0
                os.ftruncate(self.file.fileno(), 0)

    def write(self, at: int, view: memoryview) -> Future[None]:
        """The bytes of `view` on their way; nobody may change them, and it is let go of at the
        end."""
        return self._submit(self._write, at, [view])

    def read(self, at: int, view: memoryview) -> Future[None]:
        """Bytes on their way into `view`."""
        return self._submit(self._read, at, [view])

    def done(self, job: Future[None]) -> None:
        """Wait for a job. BurnishError where it failed."""
        try:
            job.result()
        except OSError as e:
            raise BurnishError(f"kept tensors cannot wait in {self.folder}: {e.strerror or e}; "
                               "choose another folder, or leave offload out of the recipe") from e

    def _submit(self, move: Callable[..., None], at: int, held: list[memoryview]) -> Future[None]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(WORKERS, "burnish-offload")
        return self._threads.submit(_moved, move, at, held)

    def _write(self, at: int, view: memoryview) -> None:
        self._begin()
        try:
            done = 0
            while done < len(view):
                done += put(self.file, view[done:], at + done)
            self.written += len(view)
        finally:
            self._stop()

    def _read(self, at: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            n = get(self.file, view[done:], at + done)
            if not n:
                raise OSError(f"the file holds less than the {len(view):,} bytes written to it")
            done += n

    def _begin(self) -> None:
        with self._lock:
            if not self._writing:
                self._since = clock()
            self._writing += 1

    def _stop(self) -> None:
        with self._lock:
            self._writing -= 1
            if not self._writing:
                self.busy += clock() - self._since


def _moved(move: Callable[..., None], at: int, held: list[memoryview]) -> None:
    view = held.pop()                                # the memory goes before anyone hears of it
    try:
        move(at, view)
    finally:
        view.release()


if hasattr(os, "pwrite"):
    def put(file: Any, view: memoryview, at: int) -> int:
        """Write some of `view` at a place; how much."""
        return os.pwrite(file.fileno(), view, at)

    def get(file: Any, view: memoryview, at: int) -> int:
        """Read into some of `view` from a place; how much."""
        return os.preadv(file.fileno(), [view], at)
else:                                                # a system whose files have one position
    _turn = threading.Lock()

    def put(file: Any, view: memoryview, at: int) -> int:
        with _turn:
            file.seek(at)
            return file.write(view)

    def get(file: Any, view: memoryview, at: int) -> int:
        with _turn:
            file.seek(at)
            return file.readinto(view)
