"""The pictures of a report: what was measured stays in the chart, and a phone can read it."""

from __future__ import annotations

import re
from pathlib import Path

import burnish
from burnish.fit import figures


def report(bytes_at):
    points = [(n, {"weights": b}) for n, b in enumerate(bytes_at)]
    return {"timeline": points, "phases": [("forward", 0), ("backward", 2)],
            "peak_bytes": max(bytes_at), "by_category": {"weights": max(bytes_at)}}


def heights(svg):
    """The y of every point of what is drawn, and the height of the picture."""
    tall = float(re.search(r'viewBox="0 0 [0-9.]+ ([0-9.]+)"', svg).group(1))
    drawn = " ".join(re.findall(r'<path d="([^"]*)" clip-path', svg))
    return [float(y) for y in re.findall(r"[ML] -?[0-9.]+ (-?[0-9.]+)", drawn)], tall


def test_a_measured_step_above_its_promise_stays_in_the_chart():  # newcomer C10
    svg = figures.timeline(report([10, 20, 30, 20]), report([10, 60, 90, 20]))
    ys, tall = heights(svg)
    assert len(ys) > 8 and all(0 <= y <= tall for y in ys)


def test_charts_keep_a_width_that_can_be_read():  # newcomer C10
    page = Path(burnish.__file__).with_name("fit") / "assets" / "report.html.j2"
    text = page.read_text()
    drawn = re.findall(r"pictures\.(\w+)\|safe", text)
    assert len(drawn) == 8
    assert len(re.findall(r'class="scroll picture(?: narrow)?">\{\{ pictures', text)) == len(drawn)
    assert ".picture svg { min-width: 600px;" in text
