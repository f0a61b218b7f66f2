"""``burnish fit --launch N``: the same call in N processes that train together."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from ..core.errors import ConfigError


def command(processes: int, words: Sequence[str]) -> list[str]:
    """What starts ``burnish fit`` with these words so many times on this machine (torchrun, which
    finds a free port by itself).

    >>> command(2, ["--data", "digits"])[1:]
    ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'burnish', \
'fit', '--data', 'digits']
    """
    if processes < 2:
        raise ConfigError(f"--launch {processes}: expected how many processes train together, 2 or "
                          "more; leave it out for one")
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(processes), "-m", "burnish", "fit", *words]


def launch(processes: int, words: Sequence[str], show: bool = True) -> int:
    """Show the command and run it; returns its exit code."""
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--launch starts the processes, and this one was started with others "
                          "already; leave --launch out under torchrun")
    call = command(processes, words)
    if show:
        print("$ " + shlex.join(["python", *call[1:]]), file=sys.stderr, flush=True)
    return subprocess.call(call)
