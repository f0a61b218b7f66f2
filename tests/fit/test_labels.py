"""Rows labelled with several classes, numbers, tags and answers, in the layouts people have."""

from __future__ import annotations

import json

import pytest

from burnish.core.errors import DataError
from burnish.fit.data import read
from burnish.fit.readings import AmbiguousError


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


# -- several classes -------------------------------------------------------------------------------
SEVERAL = [{"text": "a b", "label": ["red", "big"]}, {"text": "c", "label": []},
           {"text": "d", "label": ["big"]}, {"text": "e", "label": ["blue", "red"]}]


def test_lists_of_classes_are_several(tmp_path):
    data = read(lines(tmp_path / "x.jsonl", SEVERAL), validation=0)
    assert data.task == "text-multi-label" and data.labels == ("big", "blue", "red")
    assert data.train["label"][:] == [[0, 2], [], [0], [1, 2]]


def test_columns_of_ones_and_noughts_are_several(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,rude,loud\na b,1,0\nc d,0,0\ne f,1,1\n")
    data = read(path, label="rude,loud", validation=0)
    assert data.task == "text-multi-label" and data.labels == ("rude", "loud")
    assert data.train["label"][:] == [[0], [], [0, 1]]
    assert "not read" not in data.columns
    with pytest.raises(DataError, match="label names 'lod', .*did you mean 'loud'"):
        read(path, label="rude,lod")
    path.write_text("text,rude,loud\na b,1,maybe\n")
    with pytest.raises(DataError, match="line 2, field 'loud': expected 1 .* found 'maybe'"):
        read(path, label="rude,loud")


def test_a_row_without_a_list_among_lists_is_named(tmp_path):
    rows = [*SEVERAL, {"text": "f", "label": None}]
    with pytest.raises(DataError, match="line 5, field 'label': expected a list of classes"):
        read(lines(tmp_path / "x.jsonl", rows))


# -- numbers ---------------------------------------------------------------------------------------
def test_whole_numbers_are_met_where_that_is_said(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"text": f"t {i}", "label": i} for i in range(9)])
    assert read(path, validation=0).task == "text-classification"
    data = read(path, task="text-regression", validation=0)
    assert data.train["label"][:] == [float(i) for i in range(9)] and data.labels is None


@pytest.mark.parametrize("wrong, words", [
    ("two", "expected a number, found 'two'"), (None, "expected a number, found None"),
    (float("inf"), "expected a number, found inf")])
def test_what_is_no_number_is_named(tmp_path, wrong, words):
    path = lines(tmp_path / "x.jsonl", [{"text": "a", "label": 1.5}, {"text": "b", "label": wrong}])
    with pytest.raises(DataError, match=f"line 2, field 'label': {words}"):
        read(path, task="text-regression")


def test_one_number_for_all_is_nothing_to_learn(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"text": "a", "label": 1.5}] * 3)
    with pytest.raises(DataError, match="every row is 1.5"):
        read(path, task="text-regression")
    (tmp_path / "split").mkdir()
    lines(tmp_path / "split" / "train.jsonl", [{"text": "a", "label": 1.5}, {"text": "b",
                                                                         "label": 0.5}])
    lines(tmp_path / "split" / "test.jsonl", [{"text": "a", "label": -1.0}] * 3)    # hidden labels
    assert len(read(tmp_path / "split", task="text-regression", validation=0).test) == 3


def test_held_out_rows_of_numbers_are_a_part_of_all(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"text": f"t {i}", "label": i / 7} for i in range(50)])
    data = read(path)
    assert (len(data.train), len(data.validation)) == (45, 5)
    assert read(path).fingerprint() == data.fingerprint()


# -- tags ------------------------------------------------------------------------------------------
TAGGED = [{"tokens": ["Ada", "met", "Alan"], "tags": ["B-PER", "O", "B-PER"]},
          {"tokens": ["in", "New", "York"], "tags": ["O", "B-LOC", "I-LOC"]}]


def test_words_with_tags(tmp_path):
    data = read(lines(tmp_path / "x.jsonl", TAGGED), validation=0)
    assert data.task == "token-classification" and data.labels == ("O", "B-LOC", "B-PER", "I-LOC")
    assert data.train["tags"][:] == [[2, 0, 2], [0, 1, 3]]
    assert data.train["tokens"][1] == ["in", "New", "York"]


def test_conll_files(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("-DOCSTART- -X- O O\n\nAda NNP B-NP B-PER\nmet VBD B-VP O\n\nAlan NNP B-NP "
                    "B-PER\n")
    data = read(path, validation=0)
    assert data.task == "token-classification" and data.layout == "CoNLL"
    assert data.train["tokens"][:] == [["Ada", "met"], ["Alan"]]
    assert [data.labels[t] for row in data.train["tags"] for t in row] == ["B-PER", "O", "B-PER"]
    assert data.where["train"](1).endswith("line 6")
    path.write_text("Ada B-PER\nmet\n")
    with pytest.raises(DataError, match="line 2: expected a word and its tag, found 'met'"):
        read(path)


def test_a_line_about_a_conll_sentence_is_no_word(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("# id 1 domain=en\nAda B-PER\n# O\n\n# id 2 domain=en\nmet O\n")
    data = read(path, validation=0)
    assert data.train["tokens"][:] == [["Ada", "#"], ["met"]]


def test_several_columns_of_tags_are_asked_about(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{**r, "pos": ["a", "b", "a"]} for r in TAGGED])
    with pytest.raises(AmbiguousError) as e:
        read(path)
    assert [dict(r.flags)["label"] for r in e.value.readings] == ["tags", "pos"]
    assert read(path, label="pos", validation=0).labels == ("a", "b")


def test_tags_and_words_are_of_one_number(tmp_path):
    rows = [*TAGGED, {"tokens": ["x", "y"], "tags": ["O"]}]
    with pytest.raises(DataError, match="line 3, field 'tags': 1 tags for 2 words"):
        read(lines(tmp_path / "x.jsonl", rows))


def test_words_without_a_tag_are_named():
    import datasets

    tagged = datasets.Dataset.from_dict(
        {"tokens": [["a", "b"], ["c", "d"]], "ner_tags": [[0, 1], [1, -100]]},
        features=datasets.Features({
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "x"]))}))
    with pytest.raises(DataError, match=r"train\[1\], field 'ner_tags': the label is missing"):
        read(tagged, validation=0)


def test_classes_of_a_hub_set_keep_their_order_by_column():
    import datasets

    names = ["z", "y", "x"]
    rows = datasets.Dataset.from_dict(
        {"text": ["a b", "c d", "e f"], "label": [0, 2, 1], "other": [0, 1, 1]},
        features=datasets.Features({"text": datasets.Value("string"),
                                    "label": datasets.ClassLabel(names=names),
                                    "other": datasets.ClassLabel(names=["p", "q"])}))
    assert read(rows, validation=0, text="text").labels == tuple(names)
    tagged = datasets.Dataset.from_dict(
        {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [2]]},
        features=datasets.Features({"tokens": datasets.List(datasets.Value("string")),
                                    "ner_tags": datasets.List(datasets.ClassLabel(names=names))}))
    data = read(tagged, validation=0)
    assert data.labels == tuple(names) and data.train["tags"][:] == [[0, 1], [2]]


# -- questions -------------------------------------------------------------------------------------
CONTEXT = "The glaze is fired at 1060 degrees, the clay at 950."


def question(answers):
    return {"context": CONTEXT, "question": "How hot?", "answers": answers}


@pytest.mark.parametrize("answers", [
    {"text": ["1060 degrees"], "answer_start": [CONTEXT.index("1060")]},
    [{"text": "1060 degrees", "answer_start": CONTEXT.index("1060")}],
    {"text": "1060 degrees", "answer_start": CONTEXT.index("1060")}, "1060 degrees",
    ["1060 degrees"]])
def test_every_way_to_write_an_answer(tmp_path, answers):
    data = read(lines(tmp_path / "x.jsonl", [question(answers)] * 4), validation=0)
    assert data.task == "question-answering"
    assert data.train[0]["answers"] == {"text": ["1060 degrees"],
                                        "answer_start": [CONTEXT.index("1060")]}


def test_squads_own_files(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": [
        {"context": CONTEXT, "qas": [
            {"id": "1", "question": "How hot?", "answers": [
                {"text": "950", "answer_start": CONTEXT.index("950")}]},
            {"id": "2", "question": "Who?", "answers": [], "is_impossible": True}]}]}]}))
    data = read(path, validation=0)
    assert data.layout == "SQuAD" and len(data.train) == 2
    assert data.train[1]["answers"]["text"] == []


@pytest.mark.parametrize("answers, words", [
    ({"text": ["950"], "answer_start": [3]}, "at answer_start 3 the context says ' gl|at answer_"
                                             "start 3 the context says 'gl"),
    ("minus", "'minus' stands in the context nowhere"),
    ("e", r"'e' stands in the context \d times; say which"),
    ({"text": [""], "answer_start": [0]}, "an answer is ''"),
    ({"text": ["950"], "answer_start": [1, 2]}, "1 texts and 2 starts"),
    (7, "expected texts with answer_start, found int")])
def test_answers_that_cannot_be_right_are_named(tmp_path, answers, words):
    rows = [question("1060 degrees"), question(answers)]
    with pytest.raises(DataError, match=f"line 2, field 'answers': ({words})"):
        read(lines(tmp_path / "x.jsonl", rows), task="question-answering")
