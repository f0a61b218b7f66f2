"""A page in the browser: pick a model and data, see what each recipe costs, train, watch, try.

    app.py       the routes, and the limits of what a request may carry
    guard.py     who may ask: Host, Origin and, off this machine, a token
    places.py    what may be read: the root and the folder of runs, nothing else
    desk.py      a process beside the server that reads data, plans and answers
    runs.py      runs: each a process of ``burnish fit`` with a folder of its own
    page/        the page itself, plain files

The server imports no torch: it starts at once, and what runs out of memory is not the server.
"""

from __future__ import annotations

from typing import Any

__all__ = ["serve"]


def __getattr__(name: str) -> Any:
    if name == "serve":
        from .server import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
