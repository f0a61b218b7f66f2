"""burnish mix: small runs on several mixtures, a mixture foretold, rows written by it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from burnish.cli import main
from burnish.cli.mixtures import read


def run(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A model of bytes; rows that answer as the held-out ones do, and rows that answer noise."""
    from tests.e2e.conftest import bytelevel
    from transformers import LlamaConfig, LlamaForCausalLM

    at = tmp_path_factory.mktemp("mix")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=bytelevel(at / "base"), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )).save_pretrained(at / "base")
    lines(at / "right.jsonl", [{"prompt": f"the {i}", "completion": " aaaa"} for i in range(40)])
    lines(at / "noise.jsonl", [{"prompt": f"the {i}", "completion": f" {chr(98 + i % 20) * 4}"}
                               for i in range(40)])
    lines(at / "held.jsonl", [{"prompt": f"one {i}", "completion": " aaaa"} for i in range(8)])
    return at


def asked(at, *more):
    return ("mix", at / "base", at / "right.jsonl", at / "noise.jsonl", "--held",
            at / "held.jsonl", "--recipe", "full", "--count", "24", "--lr", "0.005", "--batch", "8",
            "--how", "damo(trials=3, degree=1)", *more)


def test_rows_of_the_better_data_set_are_chosen_and_written(capsys, at, tmp_path):
    code, out, err = run(capsys, *asked(at, "--out", tmp_path / "mixed.jsonl", "--rows", "50",
                                        "--json"))
    assert code == 0, err
    told = json.loads(out)
    alone = {max(t["shares"], key=t["shares"].get): t["figure"] for t in told["tried"]
             if max(t["shares"].values()) > 0.99}
    assert alone["right"] > alone["noise"] and len(told["tried"]) == 3
    assert told["chosen"]["right"] > 0.9
    assert told["foretold"]["shares"]["right"] > 0.9
    rows = [json.loads(x) for x in (tmp_path / "mixed.jsonl").read_text().splitlines()]
    kinds = Counter(r["completion"] == " aaaa" for r in rows)
    assert len(rows) == told["rows"] == 50 and kinds[True] >= 45
    assert all(set(r) == {"prompt", "completion"} for r in rows)


@pytest.mark.parametrize(("change", "says"), [
    (["--how", "tent"], "data are mixed by damo"),
    (["--rows", "5"], "--rows does nothing without --out"),
    (["--out", "x.csv"], "a file that ends in .jsonl"),
    (["--held", "gone.jsonl"], "expected a .jsonl file that is there")])
def test_what_cannot_be_mixed_is_refused(capsys, at, change, says):
    code, _, err = run(capsys, *asked(at, *change))
    assert code != 0 and says in err and "Traceback" not in err, err


def test_one_data_set_is_no_mixture(capsys, at):
    code, _, err = run(capsys, "mix", at / "base", at / "right.jsonl", "--held", at / "held.jsonl")
    assert code != 0 and "two data sets or more" in err


def test_rows_are_read_with_their_keys_in_order(tmp_path):
    from burnish.core.errors import DataError

    file = tmp_path / "a.jsonl"
    file.write_text('{"b": 1, "a": "é"}\n\n{"a": "é", "b": 1}\n')
    assert read(file) == ['{"a": "é", "b": 1}'] * 2
    for text, says in (("nonsense\n", "line 1: no JSON"), ("[1]\n", "line 1: expected an object"),
                       ("\n", "has no rows")):
        file.write_text(text)
        with pytest.raises(DataError, match=says):
            read(file)
