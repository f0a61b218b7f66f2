"""The pictures of a report, as SVG text to stand inside a page. Quiet colours, words on the data.

Every function returns an empty string where there is nothing to draw.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..memory import format_bytes

INK, FAINT, GRID = "#1d2733", "#6b7785", "#e4e8ec"
ACCENT, WARM, GOOD = "#2f5d8a", "#d1495b", "#2a9d6f"
KINDS = {"weights": "#33415c", "optimizer": "#5c7899", "gradients": "#8fb8c9",
         "activations": "#e9a03b", "temporary": "#d1495b"}


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(GRID)
        ax.tick_params(colors=FAINT, labelsize=8, length=0)
        ax.grid(axis="y", color=GRID, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, words: str) -> str:
    """Stand-alone SVG without prologue; the same picture always gives the same text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": words}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{words}"', 1)


def learning(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> str:
    """Loss over steps, and the validation metric beside it."""
    train = [(h["step"], h["loss"]) for h in history if "loss" in h]
    held = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    by = (best.get("by") or "").removeprefix("eval_")
    names = [f"eval_{n}" for n in (by, "accuracy", "token_accuracy", "f1", "spearman")
             if n not in ("", "loss")]
    metric = next((n for n in names if any(n in h for h in history)), None)
    scores = [(h["step"], h[metric]) for h in history if metric and metric in h]
    if not train:
        return ""
    figure, axes = _axes(9, 3.0, 2 if scores else 1)
    ax = axes[0]
    ax.plot(*zip(*train, strict=True), color=ACCENT, linewidth=1.4, label="training")
    if held:
        ax.plot(*zip(*held, strict=True), color=WARM, linewidth=1.4, marker="o", markersize=3,
                label="validation")
    low = min(v for _, v in [*train, *held])
    if low > 0 and max(v for _, v in [*train, *held]) > 20 * low:
        ax.set_yscale("log")
    ax.set_title("loss", loc="left", fontsize=10, color=INK)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    if scores:
        ax = axes[1]
        ax.plot(*zip(*scores, strict=True), color=GOOD, linewidth=1.4, marker="o", markersize=3)
        at = next((s for s in scores if s[0] == best.get("step")), None)
        if at:
            ax.scatter([at[0]], [at[1]], s=42, facecolors="none", edgecolors=INK, zorder=5)
            ax.annotate(f"kept: {at[1]:.4g}", at, xytext=(-6, -14), textcoords="offset points",
                        ha="right", fontsize=8, color=INK)
        ax.set_title(f"validation {metric.removeprefix('eval_').replace('_', ' ')}", loc="left",
                     fontsize=10, color=INK)
    for ax in axes:
        ax.set_xlabel("step", fontsize=8, color=FAINT)
    return _svg(figure, "loss and validation metric over steps")


def memory(simulated: Mapping[str, Any] | None, measured: Mapping[str, Any] | None) -> str:
    """Promise and truth as two stacked bars: what lived at the peak."""
    rows = [(w, r) for w, r in (("promised", simulated), ("measured", measured)) if r]
    if not rows:
        return ""
    figure, (ax,) = _axes(9, 0.75 + 0.5 * len(rows))
    ax.grid(False)
    top = max(r["peak_bytes"] for _, r in rows)
    for y, (_, r) in enumerate(rows):
        left = 0
        for kind, colour in KINDS.items():
            size = r["by_category"].get(kind, 0)
            ax.barh(y, size, left=left, color=colour, height=0.62,
                    label=kind if y == 0 else None)
            if size > 0.09 * top:
                ax.text(left + size / 2, y, format_bytes(size), ha="center", va="center",
                        fontsize=8, color="white")
            left += size
        ax.text(left + 0.008 * top, y, format_bytes(r["peak_bytes"]), va="center", fontsize=9,
                weight="bold", color=INK)
    ax.set_yticks(range(len(rows)), [w for w, _ in rows], fontsize=9, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(0, top * 1.1)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.0),
              labelcolor=INK, handlelength=1, columnspacing=1.2)
    return _svg(figure, "peak memory, promised and measured, by category")


def timeline(simulated: Mapping[str, Any] | None, measured: Mapping[str, Any] | None) -> str:
    """One training step: the promise as stacked areas, the measured total as a line.

    A real step takes other numbers of operations than the same step on tensors without bytes, so
    the two are laid over each other phase by phase.
    """
    if not simulated or not simulated["timeline"]:
        return ""
    figure, (ax,) = _axes(9, 3.1)
    spans = _spans(simulated)
    total = max(1, sum(n for _, _, n in spans))
    widths = {name: n / total for name, _, n in spans}
    x, parts = _curve(simulated, widths)
    ax.stackplot(x, [[p.get(k, 0) for p in parts] for k in KINDS], colors=list(KINDS.values()),
                 linewidth=0, step="post")
    drawn: list[Mapping[str, int]] = []
    if measured and measured["timeline"] and {n for n, _, _ in _spans(measured)} == set(widths):
        mx, drawn = _curve(measured, widths)
        ax.step(mx, [sum(p.values()) for p in drawn], where="post", color=INK, linewidth=1.0,
                label="measured")
        ax.legend(frameon=False, fontsize=8, loc="upper left", labelcolor=INK)
    at = 0.0
    for name, width in widths.items():
        if at:
            ax.axvline(at, color=INK, linewidth=0.6, linestyle=":")
        if width > 0.04:
            ax.text(at + width / 2, -0.05, name, transform=ax.get_xaxis_transform(), ha="center",
                    va="top", fontsize=8, color=FAINT)
        at += width
    ax.set_xlim(0, 1)
    ax.set_xticks([])
    top = max(sum(p.values()) for p in [*parts, *drawn])
    ax.set_ylim(0, top * 1.15)
    ticks = [top * f for f in (0.25, 0.5, 0.75, 1.0)]
    ax.set_yticks(ticks, [format_bytes(t) for t in ticks])
    return _svg(figure, "live memory over one training step")


def _spans(report: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(phase, its first event, how many it has), in order of first appearance."""
    points = report["timeline"]
    begin, end = points[0][0], points[-1][0] + 1
    first: dict[str, int] = {}
    for name, n in report["phases"]:
        first.setdefault(name, min(max(begin, n), end))
    order = sorted(first.items(), key=lambda kv: kv[1])
    stops = [n for _, n in order[1:]] + [end]
    return [(name, n, stop - n) for (name, n), stop in zip(order, stops, strict=True) if stop > n]


def _curve(report: Mapping[str, Any], widths: Mapping[str, float]
           ) -> tuple[list[float], list[Mapping[str, int]]]:
    """Positions in [0, 1], each phase stretched to its width, and what lived there."""
    x, at = [], 0.0
    spans = []
    for name, start, count in _spans(report):
        spans.append((start, count, at, widths[name]))
        at += widths[name]
    for n, _ in report["timeline"]:
        start, count, left, width = next(s for s in reversed(spans) if n >= s[0] or s is spans[0])
        x.append(left + width * min(1.0, max(0, n - start) / max(1, count)))
    return x, [p for _, p in report["timeline"]]


def forecast(shown: Mapping[str, Any] | None) -> str:
    """A series, what it did next and what was foretold of it, a channel beside another.

    shown: ``channels``, of each its name, ``past``, ``truth`` and ``forecast``.
    """
    if not shown or not shown["channels"]:
        return ""
    figure, axes = _axes(9, 2.8, len(shown["channels"]))
    for ax, c in zip(axes, shown["channels"], strict=True):
        after = range(1, len(c["truth"]) + 1)
        ax.plot(range(1 - len(c["past"]), 1), c["past"], color=FAINT, linewidth=1.0)
        ax.plot(after, c["truth"], color=ACCENT, linewidth=1.4, label="what came")
        ax.plot(after, c["forecast"], color=WARM, linewidth=1.4, label="forecast")
        ax.set_title(c["name"], loc="left", fontsize=10, color=INK)
        ax.set_xlabel("rows", fontsize=8, color=FAINT)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    return _svg(figure, "forecast beside what came")


def confusion(found: Mapping[str, Any]) -> str:
    """Right classes as lines, what was said as columns; the darker, the larger the share."""
    counts = found.get("counts")
    if not counts or len(counts) < 2:
        return ""
    names, n = [c if len(c) <= 16 else c[:15] + "…" for c in found["classes"]], len(counts)
    side = min(7.0, 1.6 + 0.36 * n)
    figure, (ax,) = _axes(side + 0.8, side)
    ax.grid(False)
    share = [[v / max(1, sum(line)) for v in line] for line in counts]
    ax.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for i, line in enumerate(counts):
        for j, v in enumerate(line):
            if v:
                ax.text(j, i, v, ha="center", va="center", fontsize=8 if n <= 16 else 6,
                        color="white" if share[i][j] > 0.55 else INK if i == j else WARM)
    ax.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=8)
    ax.set_yticks(range(n), names, fontsize=8)
    ax.set_xlabel("said", fontsize=8, color=FAINT)
    ax.set_ylabel("right", fontsize=8, color=FAINT)
    return _svg(figure, "which class was taken for which")


def layers(moved: Mapping[str, Mapping[str, float]]) -> str:
    """Where the update went: relative size, and the share of entries it touches."""
    if not moved:
        return ""
    names = list(moved)
    sparse = any(v["nonzero"] < 0.999 for v in moved.values())
    figure, axes = _axes(9, max(1.6, 0.17 * len(names) + 0.6), 2 if sparse else 1)
    y = range(len(names))
    for ax, key, colour, words in zip(
            axes, ("change", "nonzero"), (ACCENT, GOOD),
            ("size of the update, relative to the weight", "share of entries that moved"),
            strict=False):
        ax.barh(y, [moved[n][key] for n in names], color=colour, height=0.7)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color=GRID, linewidth=0.7)
        ax.set_title(words, loc="left", fontsize=10, color=INK)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_yticks([])
    axes[0].set_yticks(list(y), [_brief(n) for n in names], fontsize=7, color=INK)
    if sparse:
        axes[1].set_xlim(0, 1)
    return _svg(figure, "change of every tuned weight")


def spectra(moved: Mapping[str, Mapping[str, Any]]) -> str:
    """How many directions each update has, and how its singular values fall."""
    names = [n for n in moved if moved[n].get("values")]
    if not names:
        return ""
    figure, axes = _axes(9, max(2.2, 0.17 * len(names) + 0.6), 2)
    y = range(len(names))
    axes[0].barh(y, [moved[n]["effective_rank"] for n in names], color=ACCENT, height=0.7)
    axes[0].grid(axis="y", visible=False)
    axes[0].grid(axis="x", color=GRID, linewidth=0.7)
    axes[0].set_xlim(left=0)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    axes[0].set_yticks(list(y), [_brief(n) for n in names], fontsize=7, color=INK)
    axes[0].set_title("effective rank of the update", loc="left", fontsize=10, color=INK)
    lines = [[v / moved[n]["values"][0] for v in moved[n]["values"]
              if v > 1e-6 * moved[n]["values"][0]] for n in names]          # below it is rounding
    for line in lines:
        axes[1].plot(range(1, len(line) + 1), line, color=ACCENT, linewidth=0.8,
                     alpha=max(0.15, min(1.0, 4 / len(lines))), marker="." if len(line) < 9 else "")
    axes[1].set_yscale("log")
    axes[1].set_ylim(min(min(line) for line in lines) / 1.5, 1.5)
    axes[1].set_title("singular values, relative to the largest", loc="left", fontsize=10,
                      color=INK)
    axes[1].set_xlabel("direction", fontsize=8, color=FAINT)
    return _svg(figure, "effective rank and singular values of every update")


def intruders(points: Sequence[tuple[float, int]], threshold: float) -> str:
    """How many leading directions look like nothing of the base, over what counts as a likeness."""
    if not points:
        return ""
    figure, (ax,) = _axes(9, 2.6)
    ax.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.4, marker="o", markersize=3)
    ax.axvline(threshold, color=INK, linewidth=0.6, linestyle=":")
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("largest cosine with a direction of the base", fontsize=8, color=FAINT)
    ax.set_title("intruder dimensions of all tuned matrices", loc="left", fontsize=10, color=INK)
    return _svg(figure, "intruder dimensions over thresholds")


def sparsity(points: Sequence[tuple[float, float]], essential: float, knee: float,
             control: Sequence[tuple[float, float]] = ()) -> str:
    """Quality over the share of weights that are zero; the control takes any of them."""
    if len(points) < 2:
        return ""
    figure, (ax,) = _axes(9, 2.8)
    for line, colour, words in ((control, FAINT, "any go"), (points, ACCENT, "the smallest go")):
        if line:
            ax.plot(*zip(*line, strict=True), color=colour, linewidth=1.4, marker="o",
                    markersize=3, label=words)
    held = dict(points)
    for at, words in ((essential, "essential"), (knee, "knee")):
        ax.axvline(at, color=INK, linewidth=0.6, linestyle=":")
        ax.annotate(f"{words} {at:.3g}", (at, held[at]), xytext=(4, 8 if words == "knee" else -14),
                    textcoords="offset points", fontsize=8, color=INK)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of weights that are zero", fontsize=8, color=FAINT)
    ax.set_title("quality of the pruned model", loc="left", fontsize=10, color=INK)
    if control:
        ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _svg(figure, "quality over the share of weights that are zero")


def dimension(points: Sequence[tuple[int, float]], whole: float, bar: float) -> str:
    """The figure over the size of the subspace, what everything reaches, and where the bar is."""
    if not points:
        return ""
    figure, (ax,) = _axes(9, 2.8)
    ax.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.4, marker="o", markersize=3)
    ax.axhline(whole, color=INK, linewidth=0.8)
    ax.axhline(bar, color=INK, linewidth=0.6, linestyle=":")
    if (first := next((d for d, p in points if p >= bar), None)) is not None:
        ax.axvline(first, color=WARM, linewidth=0.8)
        ax.annotate(f"{first}", (first, min(p for _, p in points)), xytext=(4, 0),
                    textcoords="offset points", fontsize=9, color=WARM)
    ax.set_xscale("log")
    ax.set_xlabel("size of the random subspace", fontsize=8, color=FAINT)
    ax.set_title("figure of a subspace; of everything (line), and the share asked for (dots)",
                 loc="left", fontsize=10, color=INK)
    return _svg(figure, "figure over the size of a random subspace")


def front(tried: Sequence[tuple[int, float]], best: Sequence[tuple[int, float, str]]) -> str:
    """The figure over the peak of every recipe that was tried, those that none beats by name."""
    if not tried:
        return ""
    figure, (ax,) = _axes(9, 3.4)
    ax.scatter([p / 2**20 for p, _ in tried], [f for _, f in tried], color=GRID, s=18)
    own = sorted(best)
    ax.plot([p / 2**20 for p, _, _ in own], [f for _, f, _ in own], color=ACCENT, linewidth=1.0,
            marker="o", markersize=4)
    for p, f, name in own:
        ax.annotate(_brief(name), (p / 2**20, f), xytext=(5, -3), textcoords="offset points",
                    fontsize=8, color=INK)
    ax.margins(0.12)
    ax.set_xlabel("simulated peak of a step, MiB", fontsize=8, color=FAINT)
    ax.set_title("figure on validation rows; recipes that none tried beats are named", loc="left",
                 fontsize=10, color=INK)
    return _svg(figure, "figure over memory of the recipes that were tried")


def board(tried: Sequence[tuple[str, float, float]], best: Sequence[tuple[str, float, float]]
          ) -> str:
    """Mean score over the peak beside LoRA's; recipes that none beats in both are named."""
    if not tried:
        return ""
    figure, (ax,) = _axes(9, 3.6)
    ax.scatter([p for _, p, _ in tried], [100 * s for _, _, s in tried], color=FAINT, s=18)
    ax.plot([p for _, p, _ in best], [100 * s for _, _, s in best], color=ACCENT, linewidth=1.0,
            marker="o", markersize=4)
    for name, p, s in best:
        ax.annotate(_brief(name), (p, 100 * s), xytext=(5, -3), textcoords="offset points",
                    fontsize=8, color=INK)
    ax.margins(0.12)
    ax.set_xlabel("peak of a step beside lora(rank=8)", fontsize=8, color=FAINT)
    ax.set_title("mean score in per cent; recipes that none tried beats are named", loc="left",
                 fontsize=10, color=INK)
    return _svg(figure, "mean score over memory of the recipes of the board")


def _brief(name: str, width: int = 46) -> str:
    name = name.removesuffix(".weight").replace(".weight[", "[")
    return name if len(name) <= width else "..." + name[3 - width:]


def comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Quality over memory, one point per recipe."""
    if not rows:
        return ""
    figure, (ax,) = _axes(9, 3.4)
    drawn: list[tuple[float, float]] = []
    spread = max(r["accuracy"] for r in rows) - min(r["accuracy"] for r in rows) or 1.0
    wide = max(r["measured"] for r in rows)
    for r in sorted(rows, key=lambda r: r["measured"]):
        own, here = bool(r.get("chosen")), (r["measured"] / wide, r["accuracy"] / spread)
        ax.scatter([r["measured"]], [100 * r["accuracy"]], s=90 if own else 60, zorder=4,
                   color=WARM if own else ACCENT)
        near = [d for d in drawn if abs(d[0] - here[0]) < 0.25 and abs(d[1] - here[1]) < 0.12]
        below = bool(near)
        ax.annotate(r["recipe"], (r["measured"], 100 * r["accuracy"]), xytext=(0, -17 if below
                    else 9), textcoords="offset points", ha="center", fontsize=9,
                    weight="bold" if own else "normal", color=INK)
        drawn.append(here)
    low, high = min(r["measured"] for r in rows), max(r["measured"] for r in rows)
    ax.set_xlim(low - 0.15 * (high - low) - 1, high + 0.12 * (high - low) + 1)
    worst, best = (100 * f(r["accuracy"] for r in rows) for f in (min, max))
    ax.set_ylim(worst - 0.25 * (best - worst) - 0.1, best + 0.25 * (best - worst) + 0.1)
    ticks = [low + f * (high - low) for f in (0, 0.25, 0.5, 0.75, 1)] if high > low else [low]
    ax.set_xticks(ticks, [format_bytes(round(t)) for t in ticks])
    ax.set_xlabel("measured peak of a training step", fontsize=8, color=FAINT)
    ax.set_title("test accuracy, %", loc="left", fontsize=10, color=INK)
    return _svg(figure, "test accuracy over measured memory")
