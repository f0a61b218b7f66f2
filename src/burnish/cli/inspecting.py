"""``burnish inspect``: what an adapter does to each weight, in numbers and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from .app import Json, app
from .files import Adapter, Base, Force, attached
from .screen import check_picture, emit, table


@app.command()
def inspect(
    adapter: Adapter,
    base: Base = None,
    intruders: Annotated[bool, typer.Option(
        "--intruders", help="Count leading directions that the base does not have; one complete "
                            "decomposition of every tuned matrix.")] = False,
    leading: Annotated[int, typer.Option(help="Leading directions looked at.")] = 10,
    likeness: Annotated[float, typer.Option(help="Largest cosine of an intruder with the base's "
                                                  "directions.")] = 0.5,
    picture: Annotated[Path | None, typer.Option(help="An SVG file to write.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Size, rank and spectrum of each update, and how many of its directions are new."""
    from ..fit import figures
    from ..formats import safe
    from ..methods.lifecycle.intruders import Intruders

    check_picture(picture)
    if not intruders and (leading, likeness) != (10, 0.5):
        raise ConfigError("--leading and --likeness are about intruders; add --intruders")
    method = Intruders(leading=leading, likeness=likeness)
    rows, points = look(attached(adapter, base, force)[0], method if intruders else None)
    if not rows:
        raise ConfigError(f"{adapter} changes no matrix: there is nothing to decompose")
    if picture is not None:
        drawn = figures.intruders(points, likeness) if intruders else figures.spectra(rows)
        safe.write_text(picture, drawn)
    told = {"weights": rows, "intruders": sum(r["intruders"] for r in rows.values()) if intruders
            else None, "curve": points}
    head = ["weight", "size / |W|", "moved", "effective rank", "stable rank", "90 % in"]
    body = [[n, f"{r['change']:.3g}", f"{100 * r['nonzero']:.4g} %",
             *(f"{r[k]:.3g}" if k in r else "-" for k in ("effective_rank", "stable_rank")),
             r.get("energy_rank", "-"), *([r["intruders"]] if intruders else [])]
            for n, r in rows.items()]
    text = table([*head, *(["intruders"] if intruders else [])], body, range(1, 7))
    if intruders:
        text += f"\n\n{told['intruders']} intruder dimensions among the {leading} leading " \
                f"directions of {len(rows)} matrices (cosine below {likeness:g})"
    emit(json, told, text)


def look(tuned: Any, method: Any = None) -> tuple[dict[str, dict[str, Any]],
                                                  list[tuple[float, int]]]:
    """(weight -> its figures, intruders over thresholds), one matrix at a time."""
    import torch

    from ..blocks.weight import spectrum
    from ..engine.updates import updates

    rows: dict[str, dict[str, Any]] = {}
    cosines = []
    with torch.no_grad():
        for update in updates(tuned):
            delta, W = update.delta(), update.base()
            row = rows[update.name] = {
                "change": float(delta.norm()) / max(float(W.float().norm()), 1e-12),
                "nonzero": float((delta != 0).float().mean())}
            s = update.values()
            if s is not None:
                row |= {"effective_rank": spectrum.effective_rank(s),
                        "stable_rank": spectrum.stable_rank(s),
                        "energy_rank": spectrum.energy_rank(s),
                        "values": [float(v) for v in s[:64]]}
            if method is not None:
                row["intruders"] = 0
                if delta.dim() == 2 and bool(delta.any()):
                    found = spectrum.leading(W.float().to(delta.device), W.float().to(
                        delta.device) + delta, method.leading)
                    cosines.append(found.cosines)
                    row["intruders"] = int(found.intruders(method.likeness).sum())
    return rows, spectrum.curve(cosines) if cosines else []
