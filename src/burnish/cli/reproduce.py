"""``burnish reproduce``: published memory figures against the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import CheckError
from .app import Json, app
from .screen import emit


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Rows, files or topics; default all. "
                                                           "`--list` names them.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Name the rows and run none.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    json: Json = False,
) -> None:
    """Simulate what others have published, from settings alone. Exit code 4 where one is missed."""
    from .. import reproductions

    found = reproductions.names(names or ())
    if listed:
        emit(json, found, "\n".join(found))
        return
    done = [reproductions.run(n) for n in found]
    if page is not None:
        page.write_text(reproductions.page(done), encoding="utf-8")
    emit(json, done, reproductions.table(done))
    if missed := [o.row.name for o in done if not o.kept]:
        raise CheckError(f"{len(missed)} of {len(done)} published figures are missed: "
                         f"{', '.join(missed[:4])}")
