"""Rows of a benchmark, each in a process forked after the imports, written as they end."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def rows(wanted: Sequence[dict[str, str]], make: Callable[..., dict[str, Any]], out: str,
         workers: int) -> None:
    """``make(**what)`` for each of `wanted` that `out` does not hold yet; what fails is a row with
    its error. Torch is to run on one thread before: a fork with threads in its past waits for them.
    """
    done = [json.loads(line) for line in Path(out).read_text().splitlines()] \
        if Path(out).is_file() else []

    def one(what: dict[str, str]) -> None:
        try:
            told = make(**what)
        except Exception as e:
            told = {"error": f"{type(e).__name__}: {e}"}
        line = json.dumps({**what, **told, "date": datetime.date.today().isoformat()})
        with open(out, "a") as f:
            f.write(line + "\n")
        print(line[:300], flush=True)

    fork, running = multiprocessing.get_context("fork"), []
    for what in wanted:
        if any(what.items() <= d.items() for d in done):
            continue
        while len(running := [p for p in running if p.is_alive()]) >= workers:
            time.sleep(0.1)
        running.append(fork.Process(target=one, args=(what,)))
        running[-1].start()
    for p in running:
        p.join()
