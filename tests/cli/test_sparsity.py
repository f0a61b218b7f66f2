"""burnish sparsity: a curve, its knee and what it suggests, of a folder and held-out rows."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from burnish.cli import main
from burnish.cli.sparsity import shares
from burnish.core.errors import ConfigError


def run(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a small classifier of texts, rows for it)"""
    from tests.e2e.conftest import wordpiece
    from transformers import BertConfig, BertForSequenceClassification

    at = tmp_path_factory.mktemp("sparsity")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=wordpiece(at / "model"), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=32, num_labels=2,
        initializer_range=0.2,
        id2label={0: "money", 1: "pets"}, label2id={"money": 0, "pets": 1})
    ).save_pretrained(at / "model")
    (at / "rows.csv").write_text("text,label\n" + "".join(
        f"{('the cat sat', 'stocks fell')[i % 2]} {i},{('pets', 'money')[i % 2]}\n"
        for i in range(20)))
    return at / "model", at / "rows.csv"


def test_numbers_and_a_picture(capsys, folders, tmp_path):
    model, rows = folders
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in model.iterdir()}
    code, out, err = run(capsys, "sparsity", model, rows, "--metric", "loss", "--grid", "0.2,0.9",
                         "--control", "--picture", tmp_path / "a.svg", "--drop", "5", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [s for s, _ in told["points"]] == pytest.approx([0, 0.2, 0.9], abs=0.02)
    assert told["points"][0][1] < 0, "a loss is turned, so that more is better"
    assert told["essential"] == told["points"][2][0] and told["size"] > 0
    assert told["suggests"][0] == f"sara(tau={told['size']:.3g})"
    assert len(told["control"]) == 3 and told["control"][0] == told["points"][0]
    assert told["control"][2] != told["points"][2] and told["split"] == "train"
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    assert before == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in model.iterdir()}
    code, out, _ = run(capsys, "sparsity", model, rows, "--metric", "loss", "--grid", "0.2,0.9",
                       "--control", "--drop", "5")
    assert code == 0 and "any go" in out and "500 % of the figure: those below" in out
    assert "  try  sara(tau=" in out and "essential" in out and "90.0 %" in out


def test_patterns_and_layers(capsys, folders):
    model, rows = folders
    code, out, _ = run(capsys, "sparsity", model, rows, "--runs", "4", "--drop", "9", "--metric",
                       "loss")
    assert code == 0 and all(f"{n}:4" in out for n in (4, 3, 2, 1))
    assert "  try  magnitude(mask='1:4') + dsee" in out and "those below" not in out
    code, out, _ = run(capsys, "sparsity", model, rows, "--ranking", "layer", "--grid", "0.5",
                       "--targets", "q", "--json", "--metric", "loss", "--drop", "9")
    told = json.loads(out)
    assert code == 0 and told["size"] is None and told["suggests"][0].startswith("snell(s=0.5")
    assert told["control"] is None


@pytest.mark.parametrize(("more", "why"), [
    (["--picture", "a.png"], "pictures are SVG"), (["--ranking", "both"], "expected global"),
    (["--grid", "a"], "expected shares such as"), (["--grid", "0.5,0.1"], "rising shares"),
    (["--runs", "4", "--grid", "0.5"], "grid does nothing"), (["--metric", "no"], "no figure"),
    (["--split", "test"], "has no split")])
def test_refusals_are_one_line(capsys, folders, more, why):
    code, _, err = run(capsys, "sparsity", *folders, *more)
    assert code == 2 and why in err and len(err.strip().splitlines()) == 1


def test_shares():
    assert shares("0.2, 0.4") == (0.2, 0.4)
    with pytest.raises(ConfigError, match="--grid 1;2"):
        shares("1;2")


@pytest.mark.parametrize("argv", [
    ["dimension", "--model", "no", "--data", "no", "--output", "no"],
    ["search", "lora(rank=4|8)", "--model", "no", "--data", "no", "--output", "no"],
    ["sparsity", "no", "no"], ["inspect", "no"]])
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, argv):
    (tmp_path / "file").write_text("")
    assert main([*argv, "--picture", str(tmp_path / "file" / "a.svg")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main([*argv, "--picture", "a.png"]) == 2
    assert "pictures are SVG" in capsys.readouterr().err
