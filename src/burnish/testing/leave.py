"""The end of one process of several."""

from __future__ import annotations

import os
import sys


def leave() -> None:
    """Ends this process, whose work is done. gloo's threads abort an exit of the usual kind once in
    some thirty on a busy machine ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
