"""The process that the server asks, and what it has started itself."""

from __future__ import annotations

import asyncio

from burnish.ui.asking import Desk


def test_what_it_started_ends_with_it():
    """A plan is paid for by processes of the desk's own, which hold its pipes."""
    async def left() -> bytes:
        desk = Desk()
        desk._process = process = await asyncio.create_subprocess_exec(
            "sh", "-c", "sleep 100 & echo up; wait", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, start_new_session=True)
        assert await process.stdout.readline() == b"up\n"
        await desk.end()
        return await asyncio.wait_for(process.stdout.read(), 60)

    assert asyncio.run(left()) == b""                       # nobody holds its end any more
