"""burnish bench: runs that are documents, gone on with, and shown."""

from __future__ import annotations

import json

import pytest

from burnish.board import tasks
from burnish.cli import main


@pytest.fixture
def quick(monkeypatch):
    """The task of cells, an epoch long, at one rate."""
    from dataclasses import replace

    made = tasks.cells()
    monkeypatch.setitem(tasks.TASKS, "cells", lambda: replace(made, epochs=1, choosing=1,
                                                              tried=(2,)))


def test_runs_are_made_once_and_a_refused_one_says_why(tmp_path, capsys, quick):
    ask = ["bench", "lora(rank=2)", "houlsby", "--output", str(tmp_path / "runs"), "--task",
           "cells", "--seeds", "2", "--page", str(tmp_path / "page.md")]
    assert main(ask) == 0
    first = capsys.readouterr()
    assert "lora(rank=2) at" in first.err and "| `lora(rank=2)` |" in first.out
    assert "`houlsby` on cells" in first.out
    assert (tmp_path / "page.md").read_text().split() == first.out.split()
    files = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert [f.rpartition("-")[0] for f in files] == ["cells-as_is-houlsby",
                                                     "cells-as_is-lora-rank-2"]
    assert main([*ask, "--json"]) == 0
    again = capsys.readouterr()
    assert again.err == ""                             # nothing was run again
    runs = {r["recipe"]: r for r in json.loads(again.out)["runs"]}
    assert len(runs["lora(rank=2)"]["scores"]) == 2 and runs["houlsby"]["refused"]
    assert "houlsby: " in runs["houlsby"]["refused"]


def test_more_seeds_are_run_again_and_a_file_is_no_folder(tmp_path, capsys, quick):
    ask = ["bench", "bitfit", "--output", str(tmp_path / "runs"), "--task", "cells", "--json"]
    for seeds, many in (("1", 1), ("2", 2), ("1", 2)):
        assert main([*ask, "--seeds", seeds]) == 0
        assert len(json.loads(capsys.readouterr().out)["runs"][0]["scores"]) == many
    (tmp_path / "file").write_text("")
    assert main(["bench", "bitfit", "--output", str(tmp_path / "file")]) != 0
    assert "is a file" in capsys.readouterr().err


def test_a_picture_of_the_frontier(tmp_path, capsys, quick):
    ask = ["bench", "lora(rank=8)", "bitfit", "full", "--output", str(tmp_path / "runs"), "--task",
           "cells", "--seeds", "1", "--picture", str(tmp_path / "front.svg")]
    assert main(ask) == 0
    assert "<svg" in (tmp_path / "front.svg").read_text()


@pytest.mark.parametrize(("words", "why"), [
    (["lora", "--budget", "memory"], "--budget memory: expected one of as_is, parameters"),
    (["lora", "--task", "cell"], "did you mean 'cells'"),
    (["lorra"], "did you mean 'lora'"), (["lora", "--page", "file/x.md"], "file"),
    ([], "no run in")])
def test_what_cannot_be_run_is_refused_before_minutes_are_spent(tmp_path, monkeypatch, capsys,
                                                                words, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["bench", *words, "--output", str(tmp_path / "runs")]) != 0
    assert why in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    assert main(["bench", "--output", str(tmp_path)]) != 0
    assert "x.json" in capsys.readouterr().err
