"""The server's side of the desk: starts the process, asks one question at a time, and lets it go
when nobody has asked for a while, so that what it holds in memory is given back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

from .runs import environment

#: seconds without a question after which the process is let go
IDLE = 300.0
#: the longest line it may say: a gallery of pictures
LONGEST = 1 << 26


class Desk:
    """Asks a process of ``burnish.ui.desk``. `ask` yields its messages until the last."""

    def __init__(self, idle: float = IDLE):
        self.idle = idle
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._leave: asyncio.TimerHandle | None = None
        # names on the hub are looked for on disk first: there is nothing here
        self._nowhere = tempfile.TemporaryDirectory(prefix="burnish-ui-")

    async def ask(self, what: str, how: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self._turn:
            if self._leave is not None:
                self._leave.cancel()
            answered = False
            try:
                process = await self._started()
                number = next(self._numbers)
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(json.dumps(
                    {"id": number, "ask": what, "with": dict(how)}).encode() + b"\n")
                await process.stdin.drain()
                while True:
                    text = await process.stdout.readline()
                    if not text:
                        raise ConnectionError
                    message = json.loads(text)
                    if message.pop("id") != number:
                        raise ConnectionError
                    answered = "progress" not in message
                    yield message
                    if answered:
                        break
            except (ConnectionError, ValueError):
                answered = True
                self.close()
                yield {"error": "the process that reads and plans has ended, perhaps for want of "
                                "memory; ask again", "kind": "Ended"}
            finally:
                if not answered:        # nobody waits for it: it would keep others waiting
                    self.close()
                if self._process is not None:
                    self._leave = asyncio.get_running_loop().call_later(self.idle, self.close)

    async def one(self, what: str, how: Mapping[str, Any]) -> dict[str, Any]:
        """The last message alone."""
        last: dict[str, Any] = {}
        async for message in self.ask(what, how):
            last = message
        return last

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "burnish.ui.desk", stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, cwd=self._nowhere.name, limit=LONGEST,
                env=environment(), start_new_session=True)
        return self._process

    def close(self) -> None:
        """The process ends, and what it started with it; the next question starts another."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)         # the session that it leads
                else:
                    process.kill()

    async def end(self) -> None:
        """The same, and it is gone when this returns."""
        process = self._process
        self.close()
        if self._leave is not None:
            self._leave.cancel()
        if process is not None:
            await process.wait()
