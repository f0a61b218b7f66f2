"""The demo does what it says, and says when it does not."""

from __future__ import annotations

import json
import re

import pytest

from burnish.core.errors import BurnishError, CheckError
from burnish.fit import demo as demos


def row(recipe, accuracy, difference=0.0):
    return {"recipe": recipe, "accuracy": accuracy, "difference": difference}


def test_checks_fail_where_they_should():
    good = [row("snella(rank=8)", 0.95), row("linear_probe", 0.92), row("full", 0.955)]
    assert [holds for _, holds in demos.checks(good)] == [True, True, True]
    for rows, which in (
        ([row("snella(rank=8)", 0.92), row("linear_probe", 0.92)], 0),
        ([row("snella(rank=8)", 0.94), row("linear_probe", 0.9), row("full", 0.951)], 1),
        ([row("snella(rank=8)", 0.94, 0.031), row("linear_probe", 0.9)], 2),
    ):
        assert [holds for _, holds in demos.checks(rows)].index(False) == which


def test_a_row_that_fails_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "CANDIDATES", ("bitfit",))
    with pytest.raises(BurnishError, match="row lorra.* failed: .*did you mean 'lora'"):
        demos.demo(tmp_path, quiet=True, rows={"lorra(rank=2)": [1e-3]}, epochs=1)


@pytest.mark.slow
def test_the_demo(tmp_path, capsys):
    done = demos.demo(tmp_path)
    shown = capsys.readouterr().out
    rows = {r["recipe"]: r for r in done.rows}
    assert list(rows) == ["snella(rank=8)", "linear_probe", "lora(rank=8)", "full"]
    assert all(holds for _, holds in done.checks)

    ours, best = rows["snella(rank=8)"]["accuracy"], max(r["accuracy"] for r in done.rows)
    assert ours > rows["linear_probe"]["accuracy"] and ours >= best - 0.01
    for r in done.rows:
        assert abs(r["simulated"] / r["measured"] - 1) <= 0.03
        assert f"{100 * r['accuracy']:.2f} %" in shown
        assert r["learning_rate"] in r["tried"] and len(r["tried"]) == 3
    assert rows["snella(rank=8)"]["trained"] < 0.15 * rows["full"]["trained"]

    kept = json.loads((tmp_path / "demo.json").read_text())
    assert [r["accuracy"] for r in kept["rows"]] == [r["accuracy"] for r in done.rows]
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page needs something from outside"
    assert page.count("<svg") >= 4 and "From print to handwriting" in page
    assert (tmp_path / "snella").is_dir()


def test_a_demo_whose_checks_fail_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "CANDIDATES", ("bitfit",))
    monkeypatch.setattr(demos, "PROMISE", -1.0)
    with pytest.raises(CheckError, match="this does not hold: promises of memory"):
        demos.demo(tmp_path, quiet=True, rows={"bitfit": [1e-2]}, epochs=1)
    assert (tmp_path / "report.html").exists()
