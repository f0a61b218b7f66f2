"""``burnish ui``: binds, says where, opens the browser, serves until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from ..core.errors import ConfigError

#: where runs go, below the root
RUNS = "runs"


def serve(root: str | Path = ".", port: int = 7788, host: str = "127.0.0.1", browser: bool = True,
          trust_remote_code: bool = False) -> None:
    """Serve the page for the folder `root`, until interrupted.

    root: what may be browsed; runs and uploads go into ``root/runs``.
    port: 0 takes any that is free.  host: beyond this machine (``0.0.0.0``) a random token is made
        and printed, and nothing is answered without it.
    browser: open it.  trust_remote_code: models may bring code that runs.

    Raises ConfigError for a root that is no folder, a port in use, and without starlette and
    uvicorn (the extra ``ui``).
    """
    try:
        import uvicorn

        from .app import Ui, make
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in ("uvicorn", "starlette"):
            raise
        raise ConfigError("the page is served with starlette and uvicorn: pip install "
                          "'burnish[ui]'") from None
    from .places import Places

    if os.name == "nt":
        raise ConfigError("burnish ui keeps runs by locks that Windows does not have; use Linux, "
                          "macOS or WSL")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name the one with your models and data")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written, and runs go into {folder / RUNS}")
    ui = Ui(Places.of(folder, folder / RUNS), trust_remote_code)
    app = make(ui, host)
    with contextlib.closing(_bound(host, port)) as bound:
        number = bound.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{number}/"
        if app.token is not None:
            address += f"?token={app.token}"
            print("open to others: whoever has the token may read the folder and train. Without "
                  "TLS both can be overheard; a tunnel (ssh -L) is safer", file=sys.stderr)
        print(f"burnish ui: {address}\n  {folder.resolve()}, runs in {folder / RUNS}; Ctrl-C ends "
              "the page, not the runs", flush=True)
        # its own logging would close the handlers of everybody else in the process
        server = uvicorn.Server(uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=1,
            server_header=False, proxy_headers=False, ws="none"))
        if browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        with contextlib.suppress(KeyboardInterrupt):         # which is how it ends
            server.run(sockets=[bound])


def _bound(host: str, port: int) -> socket.socket:
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(kind, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(128)                # who comes before the server runs waits
        except BaseException:
            bound.close()
            raise
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror or e}; name another "
                          "--port or --host") from None
    return bound
