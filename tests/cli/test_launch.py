"""``burnish fit --launch``: several processes that train together."""

from __future__ import annotations

import pytest

import burnish
from burnish.cli import launching, main


@pytest.fixture
def called(monkeypatch):
    """What was started; nothing really is, and it says 3."""
    calls = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launching.subprocess, "call", lambda c: calls.append(c) or 3)
    return calls


def test_launch_starts_the_same_call_in_several_processes(called, capsys):
    code = main(["fit", "--model", "m", "--data", "a b", "--launch", "2", "--shard", "fsdp2",
                 "--epochs", "1"])
    assert code == 3, "the exit code of what ran"
    assert called[0][1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "burnish",
        "fit", "--shard", "fsdp2", "--epochs", "1", "--model", "m", "--data", "a b"]
    shown = capsys.readouterr().err
    assert "--nproc-per-node 2 -m burnish fit" in shown and "'a b'" in shown


def test_launch_keeps_the_configuration_and_the_form_of_the_answer(called, capsys):
    main(["fit", "c.yaml", "--data", "x=a", "--data", "y=b", "--launch", "4", "--json"])
    assert called[0][-6:] == ["c.yaml", "--data", "x=a", "--data", "y=b", "--json"]
    assert not capsys.readouterr().err, "programs read what comes out"


def test_one_process_is_no_launch_and_started_ones_start_no_others(called, monkeypatch, capsys):
    assert main(["fit", "--launch", "1"]) == 2
    assert "2 or more" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(burnish.ConfigError, match="started with others"):
        launching.launch(2, [])
    assert not called
