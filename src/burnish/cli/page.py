"""``burnish ui``: the page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def ui(
    root: Annotated[Path, typer.Argument(help="The folder with models and data; runs go into its "
                                              "folder runs.")] = Path("."),
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 7788,
    host: Annotated[str, typer.Option(help="Beyond this machine, e.g. 0.0.0.0, a token is made and "
                                           "needed.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    trust_remote_code: Annotated[bool, typer.Option(
        "--trust-remote-code", help="Let code that comes with a model run.")] = False,
) -> None:
    """A page in the browser: model, data, plan, training, answers. Needs the extra ui."""
    from ..ui import serve

    serve(root, port, host, browser, trust_remote_code)
