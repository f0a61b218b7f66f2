"""Keys that a recipe reads beside a row are columns of the data, from fit to predict."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import burnish
from burnish.cli.training import _key
from burnish.core.errors import ConfigError, DataError
from burnish.core.keys import Key, Read, keys_of
from burnish.fit.data import read
from burnish.fit.finished import Finished
from burnish.fit.tasks import task_for

HYPER = "hyperformer(tasks=2, reduction=4)"
QUIET = {"max_steps": 3, "batch_size": 8, "quiet": True, "report": False}


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer_factory):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("bert"), tokenizer_factory()
    BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def table(tmp_path):
    """table(task=column or None): the same word has the opposite label in the other task."""
    def write(name="data.csv", **columns):
        texts = ["good"] * 2 + ["bad"] * 2
        rows = [{"text": texts[i % 4] + " " * (i % 3), "label": str(int((i % 4 < 2) ^ (i % 2)))}
                | {k: v(i) for k, v in columns.items()} for i in range(48)]
        with open(tmp_path / name, "w", newline="") as f:
            out = csv.DictWriter(f, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
        return str(tmp_path / name)
    return write


def test_a_run_reads_its_keys_off_the_columns(bert, table, tmp_path, capsys):
    """Batches bring them, evaluation and prediction too; the file says what it reads."""
    data = table(task=lambda i: i % 2)
    run = burnish.fit(bert, data, HYPER, output=tmp_path / "run", **QUIET)
    assert run.metrics["validation"]["loss"] > 0
    done = Finished.open(tmp_path / "run")
    found = done.evaluate(data)
    assert found["these"] == "held out by this run"
    assert abs(found["tuned"]["loss"] - run.metrics["validation"]["loss"]) < 1e-5
    with pytest.raises(ConfigError, match="hyperformer reads 'task'.*--given task=.*0 to 1"):
        list(done.predict(["good"]))
    one, two = (list(done.predict(["good"], keys={"task": k}))[0]["probability"] for k in (0, 1))
    assert one != two
    told = [list(done.predict(["good"], keys={"task": k}, beside=True))[0] for k in (0, 1)]
    assert told[0]["base"] == told[1]["base"]        # no task there
    assert told[0]["probability"] == one and told[1]["probability"] == two
    from burnish.cli import main

    assert main(["predict", str(tmp_path / "run"), "good", "--given", "task=1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    assert answer["probability"] == pytest.approx(two)
    assert main(["predict", str(tmp_path / "run"), "good", "--given", "task"]) == 2
    assert "expected key=number" in capsys.readouterr().err


def test_each_row_keeps_its_entry(bert, table):
    data = read(table(task=lambda i: i % 2), keys=keys_of(burnish.parse(HYPER)), validation=8)
    assert data.keys == ("task",) and "task" not in data.columns
    task = task_for(data, bert)
    for split in ("train", "validation"):
        rows, source = task.rows(split), data.splits[split]
        batch = task.collate([rows[i] for i in range(8)])
        assert batch["task"].tolist() == source["task"][:8] and batch["task"].dtype == torch.int64
        assert set(batch["task"].tolist()) == {0, 1}


def test_conversations_that_are_left_out_take_their_entries_along(tokenizer, tmp_path):
    lines = [{"prompt": "a" * (60 if i % 2 else 2), "completion": "b", "task": i % 3}
             for i in range(6)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = read(tmp_path / "d.jsonl", keys=keys_of(burnish.parse("hyperformer(tasks=3)")),
                validation=0)
    task = task_for(data, "none", processor=tokenizer, max_length=20)
    rows = task.rows("train")
    assert task.collate([rows[i] for i in range(len(rows))])["task"].tolist() == [0, 2, 1]


@pytest.mark.parametrize("columns, said", [
    ({}, "hyperformer reads 'task' .one task id per sample. of every row.*no such column"),
    ({"tusk": lambda i: 0}, "did you mean 'tusk'"),
    ({"task": lambda i: i % 3}, "field 'task'.*whole number from 0 to 1; it is '?2"),
    ({"task": lambda i: "mnli"}, "field 'task'.*it is 'mnli'"),
    ({"task": lambda i: ""}, "field 'task'")])
def test_a_column_that_is_missing_or_wrong_is_named(bert, table, tmp_path, columns, said):
    with pytest.raises(DataError, match=said):
        burnish.fit(bert, table(**columns), HYPER, output=tmp_path / "run", **QUIET)


def test_what_only_training_reads_may_be_missing_afterwards(bert, table, tmp_path):
    recipe = "loramoe(rank=2, experts=2)"
    data = table(sample_type=lambda i: i % 2)
    with pytest.raises(DataError, match="loramoe reads 'sample_type'"):
        burnish.fit(bert, table("bare.csv"), recipe, output=tmp_path / "no", **QUIET)
    burnish.fit(bert, data, recipe, output=tmp_path / "run", lr=1e-2, **QUIET,
                load_best_model_at_end=False)
    done = Finished.open(tmp_path / "run")
    assert done.evaluate(table("bare.csv"))["rows"] == 48
    assert done.evaluate(data)["these"] == "held out by this run"
    assert len(list(done.predict(["good", "bad"]))) == 2


def test_documents_end_to_end_have_no_entry_of_their_own(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n".join(
        json.dumps({"text": "a b c", "task": i % 2}) for i in range(20)))
    with pytest.raises(DataError, match="end to end, so no row has a 'task' of its own"):
        read(tmp_path / "d.jsonl", keys=keys_of(burnish.parse(HYPER)))


def test_a_real_key_is_read_off_a_column(table, tmp_path):
    keys = {"quality": Read("rated", Key("how good", real=True), 2)}
    data = read(table(quality=lambda i: i % 4 / 4), keys=keys, validation=0)
    assert data.train["quality"][:4] == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(DataError, match="field 'quality'.*how good, a number from 0 to 1; .*1.25"):
        read(table(quality=lambda i: i % 4 / 4 + 0.5), keys=keys)
    shaped = {"quality": Read("rated", Key("how good", real=True, shape=(1,)), 2)}
    with pytest.raises(DataError, match="field 'quality'"):
        read(table(quality=lambda i: 0.5), keys=shaped)


def test_a_number_given_on_the_command_line():
    assert _key("task=1") == ("task", 1) and isinstance(_key("task=1")[1], int)
    assert _key("quality=0.7") == ("quality", 0.7)
    for wrong in ("quality=.7", "quality=-1", "quality=1e3", "=1", "quality=0.7x", "quality"):
        with pytest.raises(ConfigError, match="expected key=number"):
            _key(wrong)


def test_a_column_of_an_optional_key_may_be_there(table):
    keys = {"marked": Read("it", Key("1 or 0", optional=True), 2)}
    assert read(table(), keys=keys).keys == ()
    found = read(table("more.csv", marked=lambda i: i % 2), keys=keys)
    assert found.keys == ("marked",) and found.train["marked"][:3] == [0, 1, 0]
    assert read(read(table()), keys=keys).keys == ()
