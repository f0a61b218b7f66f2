"""How many processes this run was meant to have."""

from __future__ import annotations

import os
from pathlib import Path


def alone(parent: int | None = None) -> str | None:
    """What to say where `accelerate launch` was asked for several processes and started one.

    On CPUs it does so without a word, and only its own command line shows it (read where the
    system tells it, on Linux).
    """
    if "WORLD_SIZE" in os.environ:
        return None
    try:
        line = Path(f"/proc/{parent or os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    words = [w.decode(errors="replace") for w in line]
    if not any("accelerate" in w for w in words) or not any(w.endswith("launch") for w in words):
        return None
    for k, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            count = value or words[min(k + 1, len(words) - 1)]
            if count.isdigit() and int(count) > 1:
                return (f"accelerate was asked for {count} processes and started this one alone; "
                        f"torchrun --nproc-per-node {count} ... starts {count}")
    return None
