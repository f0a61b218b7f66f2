"""Federations of people's own files: a table of texts with classes, and prose without."""

from __future__ import annotations

import json

import pytest

from burnish.cli import main

KW = ["--clients", "3", "--rounds", "1", "--batch", "8", "--json"]


def told(capsys, *words):
    assert main(["federate", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_table_of_texts(bert, tmp_path, capsys):
    (tmp_path / "mails.csv").write_text("text,label\n" + "".join(
        f"{('the cat sat', 'stocks fell')[i % 2]} {i},{('pets', 'money')[i % 2]}\n"
        for i in range(40)))
    said = told(capsys, "lora(rank=2)", *KW, "--model", bert, "--data", tmp_path / "mails.csv",
                "--alpha", "1", "--output", tmp_path / "out", "--rule", "stack")
    assert said["alpha"] == 1 and said["data"]["rows"]["train"] == 36
    assert sum(c["rows"] for c in said["clients"]) == 36 and said["split"] == "validation"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_prose_is_dealt_out_evenly(qwen, tmp_path, capsys):
    (tmp_path / "prose.txt").write_text("\n\n".join(
        f"the cat sat on the mat and the bank cut its rates {i}" for i in range(60)))
    said = told(capsys, "lora(rank=2)", *KW, "--model", qwen, "--data", tmp_path / "prose.txt")
    sizes = [c["rows"] for c in said["clients"]]
    assert said["alpha"] is None and max(sizes) - min(sizes) <= 1
    assert said["rounds"][0]["figures"]["loss"] > 0
    assert main(["federate", "lora(rank=2)", *KW, "--model", str(qwen), "--data",
                 str(tmp_path / "prose.txt"), "--alpha", "1"]) == 2
    assert "divides classes among clients" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_puts_a_federation_between_alone_and_everything(capsys):
    rows = {r["way"].partition(":")[0]: r for r in told(
        capsys, "lora(rank=8)", "--clients", "6", "--rounds", "2", "--alpha", "0.1", "--compare",
        "--json")["rows"]}
    alone, central = rows["local only"]["figure"], rows["central"]["figure"]
    for rule in ("mean", "stack"):
        assert alone < rows[rule]["figure"] < central
    assert rows["stack"]["down"] > rows["mean"]["down"]
