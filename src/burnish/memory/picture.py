"""The step as a picture: live bytes over its operators, stacked by category."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import BurnishError, ConfigError
from .units import format_bytes

if TYPE_CHECKING:
    from .report import MemoryReport

#: what stays lies at the bottom in quiet colours, what comes and goes lies on top
COLOURS = {"weights": "#33415c", "optimizer": "#5c7899", "gradients": "#8fb8c9",
           "activations": "#e9a03b", "temporary": "#d1495b"}
#: how our own pictures are known again, by the name's ending
SIGNATURE = "drawn by burnish"
SIGNED = {"png": {"Software": SIGNATURE}, "svg": {"Creator": SIGNATURE},
          "pdf": {"Creator": SIGNATURE}}
ORDER = ("weights", "optimizer", "gradients", "activations", "temporary")


def draw(report: MemoryReport, path: Path) -> Path:
    """Write the picture of a report; the ending of `path` names the format."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'burnish[fit]'") from None
    kind = _free(path)
    if not report.timeline:
        raise ConfigError("this report has no timeline to draw")

    start = report.timeline[0][0]
    x = [n - start for n, _ in report.timeline]
    layers = [[parts.get(c, 0) for _, parts in report.timeline] for c in ORDER]
    total = [sum(column) for column in zip(*layers, strict=True)]
    top = max(total)

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.stackplot(x, layers, labels=ORDER, colors=[COLOURS[c] for c in ORDER],
                 step="post", linewidth=0)
    ax.step(x, total, where="post", color="#222222", linewidth=0.7)
    ax.axhline(top, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)))
    at = x[total.index(top)]
    ax.annotate(f"peak {format_bytes(top)}", (at, top), xytext=(0, 5),
                textcoords="offset points", ha="center" if 0.2 * x[-1] < at < 0.8 * x[-1]
                else "left" if at <= 0.2 * x[-1] else "right", fontsize=9, weight="bold")

    spans = _spans(report, x[-1])
    for name, left, right in spans:
        if left:
            ax.axvline(left, color="#222222", linewidth=0.6, linestyle=":")
        if right - left > 0.05 * max(1, x[-1]):
            ax.text((left + right) / 2, -0.055, name, transform=ax.get_xaxis_transform(),
                    ha="center", va="top", fontsize=9, color="#444444")
    ax.set_xlim(0, max(1, x[-1]))
    ax.set_ylim(0, top * 1.12)
    ax.set_xticks([])
    ticks, unit, name = _scale(top * 1.12)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / unit:g} {name}" if v else "0"))
    ax.tick_params(axis="y", labelsize=9, length=0)
    ax.grid(axis="y", color="white", linewidth=0.6, alpha=0.5)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    title = " · ".join(t for t in (report.recipe, f"batch {report.batch}" if report.batch else "",
                                   f"{report.source} on {report.device}") if t)
    ax.set_title(title, loc="left", fontsize=11, pad=12)
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = handles[::-1], labels[::-1]
    sizes = report.by_category
    ax.legend(handles, [f"{c}  {format_bytes(sizes.get(c, 0))}" for c in labels],
              loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9,
              title="at the peak", title_fontsize=9, alignment="left")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format=kind, metadata=SIGNED[kind])
    temp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.write_bytes(drawn.getvalue())
        temp.replace(path)
    except OSError as e:
        raise BurnishError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
    return path


def _free(path: Path) -> str:
    """The kind of picture `path` asks for; raises ConfigError for what cannot be drawn, and for a
    file that is there and is no picture of ours."""
    kind = path.suffix[1:].lower()
    if kind not in SIGNED:
        raise ConfigError(f"a picture is {', '.join(SIGNED)}, which the name's ending says; "
                          f"{path} ends in {path.suffix or 'nothing'!r}")
    if path.exists():
        head = path.read_bytes()[: 1 << 16] if path.is_file() else b""
        if SIGNATURE.encode() not in head:
            raise ConfigError(f"{path} is there and is no picture of burnish; name another file")
    return kind


def _scale(top: float) -> tuple[list[float], int, str]:
    """Four to eight round ticks below `top`, their unit in bytes, and its name."""
    units = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
    unit, name = next((u for u in units if top >= 2 * u[0]), units[-1])
    step = 10.0 ** math.floor(math.log10(max(1.0, top / unit)))
    step *= next(f for f in (0.1, 0.2, 0.25, 0.5, 1, 2) if top / (unit * step * f) <= 8)
    return [k * step * unit for k in range(int(top / (unit * step)) + 1)], unit, name


def _spans(report: MemoryReport, end: int) -> list[tuple[str, int, int]]:
    """(phase, first, last) of each phase's whole stretch, in order of first appearance."""
    start = report.timeline[0][0]
    first: dict[str, int] = {}
    for name, n in report.phases:
        first.setdefault(name, max(0, n - start))
    names = sorted(first, key=first.__getitem__)
    lefts = [first[n] for n in names] + [end]
    return list(zip(names, lefts[:-1], lefts[1:], strict=True))
