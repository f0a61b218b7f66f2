"""``burnish conformance``: the checks that every method must pass, run on one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..core.errors import CheckError
from .app import Json, app
from .screen import emit, table

_MARK = {"pass": "pass", "not applicable": "-", "excluded": "excused", "fail": "FAIL"}


@app.command()
def conformance(
    name: Annotated[str, typer.Argument(help="A method, yours or ours.")],
    model: Annotated[list[str] | None, typer.Option(
        help="Small models to run on, e.g. vit or gpt2/q,v; default three that fit.")] = None,
    json: Json = False,
) -> None:
    """Run the conformance suite on one method; exit code 4 when a check fails."""
    import warnings

    from ..fit.driving import quiet_libraries
    from ..testing import conformance as suite

    quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = suite.run(name, model or None)
    rows = [{"check": r.check, "model": r.model, "state": r.state, "reason": r.reason}
            for r in report.results]
    emit(json, {"method": name, "count": report.count(), "results": rows}, _shown(report))
    if report.failures:
        n = len(report.failures)
        raise CheckError(f"{name} fails {n} {'check' if n == 1 else 'checks'}")


def _shown(report: Any) -> str:
    """Checks x models, then the reasons behind what is not a pass."""
    models = list(dict.fromkeys(r.model for r in report.results))
    cells: dict[str, dict[str, str]] = {}
    why: dict[tuple[str, str], list[str]] = {}
    for r in report.results:
        cells.setdefault(r.check, {})[r.model] = _MARK[r.state]
        if r.state != "pass":
            why.setdefault((f"{r.check} ({_MARK[r.state]})", r.reason), []).append(r.model)
    shown = table(("check", *models), [(c, *(marks.get(m, "") for m in models))
                                       for c, marks in cells.items()])
    notes = [f"{check} on {', '.join(on)}: {' '.join(reason.split())}"
             for (check, reason), on in why.items()]
    said = ", ".join(f"{n} {state}" for state, n in report.count().items())
    return "\n".join([shown, "", *notes, "", said])
