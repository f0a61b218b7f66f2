"""Waits for one ``burnish fit`` and writes down how it ended.

    python -m burnish.ui.child FOLDER HANDLE ROOT

It stands between the server and the run, in a session of its own, so that neither a server that
ends nor a terminal that closes takes the run along, and the exit code is known to the next server.
While either lives, ``alive`` in the folder is locked (runs.py). Before it starts anything it looks
at the data: tables that point out of root and runs are not read.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import runs
from .files import read_json, write_json
from .places import confine

INTERRUPTED = 130
TO_STOP = (signal.SIGINT, signal.SIGTERM)


def main(folder: Path, handle: int, root: str) -> int:
    started: list[subprocess.Popen[bytes]] = []

    def asked(number: int, _: object) -> None:
        """To stop: what runs is told; before it does, there is nothing to wait for."""
        if not started:
            raise KeyboardInterrupt
        started[0].send_signal(number)

    # handlers of our own go back to the default in what is started; what is ignored stays ignored
    for number in TO_STOP:
        signal.signal(number, asked)
    config, code = read_json(folder / runs.CONFIG), INTERRUPTED
    with (folder / runs.LOG).open("ab") as log:
        try:
            write_json(folder / runs.PROCESS, {"pid": os.getpid(), "started": time.time()})
            confine(str(config.get("data")), [root, str(folder.parent)],
                    [str(config[k]) for k in runs.READING if k in config])
            with held():                             # a signal comes before it, or is handed on
                started.append(subprocess.Popen(
                    [sys.executable, "-m", "burnish", "fit", str(folder / runs.CONFIG)],
                    stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                    pass_fds=(handle,), preexec_fn=_hears))
            process = started[0]
            write_json(folder / runs.PROCESS, {"pid": process.pid, "started": time.time()})
            code = process.wait()
        except KeyboardInterrupt:
            log.write(b"burnish: stopped before it began\n")
        except Exception as e:                       # nobody else would say why
            log.write(f"burnish: {' '.join(str(e).split()) or type(e).__name__}\n".encode())
            code = int(getattr(e, "exit_code", 1))
    write_json(folder / runs.ENDED, {"code": code, "time": time.time()})
    return code


@contextlib.contextmanager
def held() -> Iterator[None]:
    """No signal to stop arrives meanwhile."""
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_STOP)


def _hears() -> None:
    """In what is started, which would keep them blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_STOP)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
