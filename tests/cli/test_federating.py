"""``burnish federate``, end to end on small federations."""

from __future__ import annotations

import json

import pytest

import burnish
from burnish.cli import main
from burnish.federated import run
from burnish.fit.assets import GLYPH_VIT
from burnish.fit.tasks import evaluate

SMALL = ["--clients", "3", "--rounds", "1", "--batch", "64"]


def asked(capsys, *words, code=0):
    assert main(["federate", *words]) == code
    return capsys.readouterr()


def test_a_mean_is_written_and_scores_as_it_said(capsys, tmp_path):
    out = tmp_path / "out"
    said = json.loads(asked(capsys, "lora(rank=2)", *SMALL, "--alpha", "0.5", "--up", "bf16",
                            "--output", str(out), "--json").out)
    assert sum(c["rows"] for c in said["clients"]) == said["data"]["rows"]["train"] == 720
    (first,) = said["rounds"]
    assert first["up"] == said["bytes"]["up"] < said["bytes"]["plain_up"] == first["plain_up"]
    assert json.loads((out / "federation.json").read_text())["figures"] == said["figures"]
    at = run.setting("lora(rank=2)")
    tuned = burnish.load(at.task.load(str(GLYPH_VIT)), out)
    assert evaluate(tuned.model, at.task, "test")["accuracy"] == said["figures"]["accuracy"]
    again = asked(capsys, "lora(rank=2)", *SMALL, "--alpha", "0.5", "--up", "bf16",
                  "--output", str(out)).out
    assert f"accuracy {said['figures']['accuracy']:.4f}" in again and "uncoded up" in again
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    error = asked(capsys, "lora(rank=2)", *SMALL, "--output", str(tmp_path / "mine"), code=2).err
    assert "mine" in error


def test_a_stack_of_unlike_ranks_is_sent_shortened_and_says_what_that_lost(capsys):
    out = asked(capsys, "lora(rank=8)", *SMALL, "--rule", "stack", "--ranks", "4,2", "--rank",
                "3").out
    assert "left out of the stack's sum: " in out and "3       0" in out.replace("  3 ", " 3 ")


@pytest.mark.parametrize("words, what", [
    (["lora(rank=2)", "--compare", "--output", "x"], "leave one of them out"),
    (["lora(rank=2)", "--compare", "--rank", "2"], "--rank is of one stack"),
    (["lora(rank=2)", "--ranks", "4,b"], "'b' is no rank"),
    (["lora(rank=2)", "--ranks", "4,2", "--clients", "2"], "take the rule stack"),
    (["lora(rank=2)", "--rank", "2"], "the rule is mean"),
    (["lora(rank=2)", "--memory", "much"], "much"),
    (["lora(rank=2)", "--up", "gzip"], "no coding 'gzip'"),
    (["lora(rank=2)", "--clients", "2000"], "take 720 clients or fewer"),
    (["lora(rnk=2)"], "rnk"),
    (["bitfit", "--ranks", "2"], "0 parts of a rank"),
])
def test_what_cannot_be_done_is_said(capsys, words, what):
    assert what in asked(capsys, *words, code=2).err


def test_a_memory_chooses(capsys):
    said = json.loads(asked(capsys, "lora(rank=8)", "--clients", "2", "--rounds", "1", "--rule",
                            "stack", "--memory", "1GB,10MB", "--ranks", "8,2", "--batch", "32",
                            "--json").out)
    large, small = said["choices"]["client-0"], said["choices"]["client-1"]
    assert large["rank"] == 8 and small["needs"] <= 10e6 and large != small
    with pytest.raises(burnish.NoPlanError, match="nothing fits"):
        run.once(run.setting("lora(rank=8)", clients=2, memory=["1MB"], rounds=1))


def test_a_stack_is_a_folder_of_a_model_and_stands_beside_no_adapter(capsys, tmp_path, monkeypatch):
    out, stack = tmp_path / "out", tmp_path / "stack"
    small = ["lora(rank=2)", "--clients", "2", "--rounds", "1", "--batch", "128"]
    asked(capsys, *small, "--output", str(out))
    error = asked(capsys, *small, "--rule", "stack", "--output", str(out), code=2).err
    assert "holds an adapter" in error and not (out / "model.safetensors").exists()
    said = json.loads(asked(capsys, *small, "--rule", "stack", "--output", str(stack),
                            "--json").out)
    at = run.setting("lora(rank=2)", model=stack)    # with what reads rows for it
    assert at.score(at.model, "test") == said["figures"]
    before = {p.name: p.read_bytes() for p in stack.iterdir()}

    def full(path, data):
        raise OSError(28, "the disk is full")

    monkeypatch.setattr(run.safe, "write_json", full)
    asked(capsys, *small, "--rule", "stack", "--output", str(stack), code=1)
    assert {p.name: p.read_bytes() for p in stack.iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"out", "stack"}
