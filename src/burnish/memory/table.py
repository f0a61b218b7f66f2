"""Plans in words: a table of at most eighty columns, and the answers below it."""

from __future__ import annotations

import textwrap
from typing import Any

from ..core.recipe import parse
from .units import format_bytes
from .usual import CHUNKED

WIDTH = 80


def text(plans: Any, rows: int) -> str:
    """A plain table of what fits, or of what comes closest and what is missing."""
    shown = plans.fits or plans.over
    lines = wrapped(_head(plans))
    if shown:
        shared = _shared(shown)
        lines += ["", *table(shown[:rows], plans, shared)]
        if len(shown) > rows:
            lines.append(f"... and {len(shown) - rows} more")
        if shared:
            lines.append(f"each with {CHUNKED}")
    lines += [""] if shown and (plans.fits or plans.concessions) else []
    lines += [line for said in answers(plans) for line in wrapped(said)]
    for why in dict.fromkeys(plans.refused.values()):
        first, *rest = (r for r, reason in plans.refused.items() if reason == why)
        lines += wrapped(f"not possible here: {first}{f' and {len(rest)} more' if rest else ''}: "
                         f"{why}")
    for note in plans.notes:
        lines += wrapped(f"note: {note}")
    return "\n".join(lines)


def wrapped(said: str) -> list[str]:
    return textwrap.wrap(said, WIDTH, subsequent_indent="  ", break_long_words=False,
                         break_on_hyphens=False) or [""]


def _head(plans: Any) -> str:
    budget = format_bytes(plans.budget)
    where = plans.gpu or plans.device
    if plans.fits:
        return (f"{len(plans.fits)} recipes fit {budget} on {where} (batch {plans.shape}, by "
                f"{plans.prefer})")
    said = f"nothing fits {budget} on {where} (batch {plans.shape})"
    if plans.cheapest is None:
        return said
    return (f"{said}: the cheapest, {plans.cheapest.recipe}, needs "
            f"{format_bytes(plans.cheapest.needs)}, {format_bytes(plans.missing_bytes)} more")


def _shared(shown: list[Any]) -> bool:
    """Does every recipe end with the part that all are given? Then it is said once."""
    return all(str(parse(p.recipe)).endswith(f" + {CHUNKED}") for p in shown)


def table(shown: list[Any], plans: Any, shared: bool) -> list[str]:
    """Number, recipe and figures; a recipe too long for its column has a line of its own."""
    timed = shown[0].hours is not None
    size = plans.prefer == "size"
    unit = _unit(shown[0].hours) if timed else "time"
    rows = [("", "recipe", "batch", "peak", unit, "quality", "adapter" if size else "trains")]
    for n, p in enumerate(shown, 1):
        recipe = p.recipe.removesuffix(f" + {CHUNKED}") if shared else p.recipe
        rows.append((str(n), recipe, f"{p.batch} x {p.accumulate}" if p.accumulate > 1
                     else str(p.batch), format_bytes(p.peak_bytes),
                     span(p.hours, unit) if timed else f"{p.time:.2f}",
                     "?" if p.source.startswith("no measured") else f"{p.quality:.2f}",
                     format_bytes(p.adapter_bytes) if size else count(p.trainable)))
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    room = WIDTH - sum(w + 2 for w in widths) + widths[1] + 2
    widths[1] = min(widths[1], max(room, len("recipe")))
    out = []
    for r in rows:
        cells = list(r)
        if len(cells[1]) > widths[1]:
            out.append(f"{cells[0].rjust(widths[0])}  {cells[1]}")
            cells[:2] = ["", ""]
        out.append("  ".join(c.ljust(w) if k == 1 else c.rjust(w)
                             for k, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip())
    return out


def answers(plans: Any) -> list[str]:
    """What a person asks next, a line each."""
    out = []
    best = plans.best
    if best is not None and plans.updates is not None:
        out.append(f"{plans.rows:,} rows x {plans.epochs:g} epochs: {plans.updates:,} updates of "
                   f"{plans.batch}; the first recipe takes {duration(best.hours)}, without "
                   "reading data and evaluation")
        out.append(f"rates: {plans.rates.source}")
    elif best is not None:
        out.append("time: of an update, full fine-tuning being 1; the number of rows gives hours")
    if best is not None and (said := plans.kept_back):
        out.append(said)
    if best is not None and best.card:
        lean = min(plans.fits, key=lambda p: p.needs)
        also = f"; {_bare(lean)} fits {lean.card}" if lean.card not in (best.card, None) else ""
        out.append(f"smallest card for the first recipe: {best.card}{also}")
    for name, limit in plans.limits.items():
        above = f"; one more takes {format_bytes(limit.above)}" if limit.above else \
            f"; {limit.why}" if limit.why else ""
        out.append(f"{name}: {limit.most:,} ({format_bytes(limit.needs)} of "
                   f"{format_bytes(plans.budget)}{above})")
    if plans.concessions:
        goal = plans.goal or format_bytes(plans.budget)
        out.append(f"to fit {goal}, give up in this order:")
        for n, s in enumerate(plans.concessions, 1):
            cost = f"time x {s.time:.2f}" + (f", quality -{s.quality:.2f}" if s.quality else "")
            out.append(f"  {n}. {s.what}: saves {format_bytes(s.saves)}, needs "
                       f"{format_bytes(s.needs)} ({s.costs}; {cost})")
        if not plans.concessions[-1].fits:
            out.append("  and with all of that it does not fit")
    elif plans.goal:
        out.append(f"the first recipe fits {plans.goal} as it is" if plans.held else
                   f"nothing that can be given up brings it nearer to {plans.goal}")
    return out


def _bare(p: Any) -> str:
    return p.recipe.removesuffix(f" + {CHUNKED}")


#: units of a time, with how many make an hour
UNITS = {"hours": 1, "minutes": 60, "seconds": 3600}


def _unit(hours: tuple[float, float] | None) -> str:
    """The unit in which the longer end is 1 or more."""
    return next((u for u, n in UNITS.items() if hours is None or hours[1] * n >= 1), "seconds")


def span(hours: tuple[float, float] | None, unit: str = "hours") -> str:
    """``3.1-5.9``: two figures each."""
    if hours is None:
        return "?"
    low, high = (_two(h * UNITS[unit]) for h in hours)
    return low if low == high else f"{low}-{high}"


def duration(hours: tuple[float, float]) -> str:
    """``3.1-5.9 hours``, ``12-40 seconds``: in the unit that suits."""
    unit = _unit(hours)
    return f"{span(hours, unit)} {unit}"


def _two(x: float) -> str:
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


def count(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:,}"
