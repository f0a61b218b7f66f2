"""Waits for one ``burnish fit`` and writes down how it ended.

    python -m burnish.ui.child FOLDER [HANDLE]

It stands between the server and the run, in a session of its own, so that neither a server that
ends nor a terminal that closes takes the run along, and the exit code is known to the next server.
While either lives, ``alive`` in the folder is locked (runs.py).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from . import runs
from .files import write_json


def main(folder: Path, handle: int | None) -> int:
    # handlers of our own go back to the default in what is started; what is ignored stays ignored
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with (folder / runs.LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "burnish", "fit", str(folder / runs.CONFIG)], stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
            pass_fds=() if handle is None else (handle,))
        write_json(folder / runs.PROCESS, {"pid": process.pid, "started": time.time()})
        code = process.wait()
    write_json(folder / runs.ENDED, {"code": code, "time": time.time()})
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
