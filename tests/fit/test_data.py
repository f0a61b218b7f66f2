"""Data in every layout people have, and what is said when it is wrong."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.readings import AmbiguousError


def picture(path, value=100, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8)).save(path)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def table(path, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        csv.writer(f, delimiter=delimiter).writerows(rows)
    return path


MAILS = [["text", "label"], *[[f"word {i} here", "spam" if i % 4 == 0 else "ham"]
                              for i in range(40)]]


# -- layouts -----------------------------------------------------------------------------------
def test_digits_are_the_scans_of_scikit_learn():
    data = read("digits")
    assert [len(data.train), len(data.validation), len(data.test)] == [720, 178, 899]
    assert data.labels == tuple("0123456789")
    from sklearn.datasets import load_digits
    bunch = load_digits()
    row = data.test[5]
    assert row["label"] == bunch.target[898 + 5]
    back = np.asarray(row["image"], dtype=float) * 16 / 255
    assert np.abs(back - bunch.images[898 + 5]).max() < 0.04


def test_class_folders(tmp_path):
    for c in ("cat", "dog"):
        for i in range(5):
            picture(tmp_path / c / f"{i}.png")
    data = read(str(tmp_path))
    assert data.task == "image-classification" and data.labels == ("cat", "dog")
    assert len(data.train) == 9 and len(data.validation) == 1


def test_split_folders_of_class_folders(tmp_path):
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        for c in ("cat", "dog"):
            for i in range(n):
                picture(tmp_path / split / c / f"{i}.jpg")
    data = read(tmp_path)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 8, "validation": 4, "test": 6}


def test_pictures_described_in_a_table(tmp_path):
    rows = [["file_name", "label"]]
    for i in range(6):
        picture(tmp_path / f"{i}.png")
        rows.append([f"{i}.png", "ab"[i % 2]])
    table(tmp_path / "metadata.csv", rows)
    data = read(tmp_path, validation=0)
    assert len(data.train) == 6 and data.labels == ("a", "b")


def test_parquet_with_encoded_pictures(tmp_path):
    import io

    import pyarrow
    import pyarrow.parquet as pq
    coded = []
    for i in range(4):
        buffer = io.BytesIO()
        Image.fromarray(np.full((3, 3, 3), i, dtype=np.uint8)).save(buffer, "png")
        coded.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pyarrow.table({"image": coded, "label": [0, 1, 0, 1]}), tmp_path / "x.parquet")
    data = read(tmp_path / "x.parquet", validation=0)
    assert data.labels == ("0", "1")
    assert np.asarray(data.train[3]["image"])[0, 0, 0] == 3


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables_of_text(tmp_path, suffix, delimiter):
    data = read(table(tmp_path / f"mails{suffix}", MAILS, delimiter))
    assert data.task == "text-classification" and data.labels == ("ham", "spam")
    assert len(data.train) + len(data.validation) == 40


def test_files_named_by_split(tmp_path):
    for split, n in (("train", 8), ("dev", 4), ("test", 2)):
        lines(tmp_path / f"{split}.jsonl", [{"sentence": f"a b {i}", "label": i % 2}
                                            for i in range(n)])
    data = read(tmp_path)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 8, "validation": 4, "test": 2}


def test_columns_with_names_of_ones_own(tmp_path):
    path = table(tmp_path / "x.csv", [["said", "mood"], ["a b", "x"], ["c d", "y"]])
    with pytest.raises(DataError, match="label="):
        read(path, task="text-classification", text="said")
    data = read(path, text="said", label="mood", validation=0)
    assert data.train["text"][:] == ["a b", "c d"] and data.labels == ("x", "y")


def test_pairs_of_sentences(tmp_path):
    data = read(lines(tmp_path / "x.jsonl", [{"premise": "a", "hypothesis": "b", "label": i % 2}
                                             for i in range(4)]), validation=0)
    assert data.train.column_names == ["text", "pair", "label"]


def test_plain_texts_are_for_language_modelling(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    data = read(tmp_path, validation=0)
    assert data.task == "language-modelling" and data.train["text"][:] == ["one", "two"]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("row, expected", [
    ({"messages": CHAT}, CHAT),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
     CHAT),
    ({"instruction": "hi", "input": "", "output": "hello"}, CHAT),
    ({"instruction": "add", "input": "1 2", "output": "3"},
     [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
    ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, CHAT),
])
def test_every_form_of_conversation_becomes_one(tmp_path, row, expected):
    data = read(lines(tmp_path / "x.jsonl", [row] * 3), validation=0)
    assert data.task == "instruction-tuning"
    assert data.train[0]["messages"] == expected


def test_plain_prompts_stay_plain(tmp_path):
    data = read(lines(tmp_path / "x.jsonl", [{"prompt": "2+2=", "completion": "4"}] * 2),
                validation=0)
    assert data.train[0] == {"prompt": "2+2=", "completion": "4"}


def test_datasets_objects_take_the_same_road():
    import datasets
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 1]},
                                      features=features)
    data = read(datasets.DatasetDict(train=rows, validation=rows))
    assert data.labels == ("no", "yes") and data.train["label"][:] == [1, 0, 1, 1]


# -- what can be read in more than one way ---------------------------------------------------------
def summaries(n=20):
    return [{"document": f"a long document about matter {i} and more of it", "summary": f"on {i}"}
            for i in range(n)]


def test_documents_with_summaries_are_not_guessed(tmp_path):  # newcomer A3
    path = lines(tmp_path / "x.jsonl", summaries())
    with pytest.raises(AmbiguousError, match="in more than one way") as e:
        read(path)
    ways = [dict(r.flags) for r in e.value.readings]
    assert {"prompt": "document", "completion": "summary"} in ways
    assert {"task": "language-modelling", "text": "document"} in ways
    kinds = []
    for flags in ways:                                  # whatever is offered, works
        data = read(path, validation=0, **flags)
        kinds.append(data.task)
        if "prompt" in flags:
            assert data.train[3] == {"prompt": summaries()[3]["document"], "completion": "on 3"}
    assert kinds == ["instruction-tuning", "language-modelling"]


def test_prose_with_a_column_of_few_words_is_not_guessed(tmp_path):  # newcomer A3
    path = table(tmp_path / "x.csv", [["docstring", "area"], *[
        [f"Return the value number {i}.", ("io", "text", "net")[i % 3]] for i in range(30)]])
    with pytest.raises(AmbiguousError) as e:
        read(path)
    ways = [dict(r.flags) for r in e.value.readings]
    assert ways[0] == {"text": "docstring", "label": "area"}
    data = read(path, **ways[0])
    assert data.task == "text-classification" and data.labels == ("io", "net", "text")
    assert read(path, **ways[-1]).task == "language-modelling"


def test_answers_marked_good_and_bad_are_not_all_learnt(tmp_path):
    rows = [{"prompt": f"what is {i}", "completion": f"it is {i % 7}", "label": i % 2 == 0}
            for i in range(20)]
    data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
    assert data.task == "unpaired-preference-tuning" and data.train["good"][:2] == [True, False]
    assert read(tmp_path / "x.jsonl", task="instruction-tuning").task == "instruction-tuning"
    rows = [{**r, "label": "fine" if r["label"] else "poor"} for r in rows]
    with pytest.raises(AmbiguousError):
        read(lines(tmp_path / "y.jsonl", rows))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_with_fractions_are_no_classes(tmp_path, suffix):  # newcomer A3
    rows = [("text", "label"), *[(f"a text {i}", round(i * 0.37, 2)) for i in range(1, 99)]]
    path = tmp_path / f"x.{suffix}"
    if suffix == "csv":
        table(path, rows)
    else:
        lines(path, [{"text": t, "label": x} for t, x in rows[1:]])
    data = read(path, validation=0)
    assert data.task == "text-regression" and data.labels is None
    assert data.train["label"][:3] == [0.37, 0.74, 1.11]
    with pytest.raises(DataError, match="line .*the label is 0.37, .*regression"):
        read(path, task="text-classification")


def test_whole_numbers_are_classes_however_they_are_written(tmp_path):
    path = table(tmp_path / "x.csv", [["text", "label"], ["a", "3.0"], ["b", "3"], ["c", "1.0"]])
    assert read(path, validation=0).labels == ("1", "3")


def test_several_columns_of_words_are_not_chosen_from_in_silence(tmp_path):
    rows = [{"title": f"some title {i}", "body": f"the body of mail {i}", "label": i % 2}
            for i in range(9)]
    path = lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(AmbiguousError) as e:
        read(path)
    assert dict(e.value.readings[0].flags) == {"text": "body", "label": "label"}
    with pytest.raises(DataError, match="which column holds the text: .*name it with text="):
        read(path, label="label")
    assert str(read(path, text="body")).endswith("text from 'body'; not read: title")


def test_instructions_under_other_names_are_offered_as_such(tmp_path):
    rows = [{"instruction": f"do {i} now", "context": f"a long context to read first, {i}" * 3,
             "response": f"done with {i}", "category": "abc"[i % 3]} for i in range(20)]
    path = lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(AmbiguousError) as e:
        read(path)
    ways = [dict(r.flags) for r in e.value.readings]
    assert {"prompt": "instruction", "completion": "response"} in ways
    assert read(path, validation=0, prompt="instruction", completion="response").train[1] == {
        "prompt": "do 1 now", "completion": "done with 1"}


def test_several_columns_of_classes_are_not_chosen_from_in_silence(tmp_path):
    rows = [{"text": f"words {i}", "category": "ab"[i % 2], "topic": "cd"[i % 2]}
            for i in range(9)]
    with pytest.raises(DataError, match="holds the label: category or topic; name it"):
        read(lines(tmp_path / "x.jsonl", rows))


def test_a_target_of_whole_sentences_is_no_label(tmp_path):
    rows = [{"source": f"some words to say {i}", "target": f"other words to say {i}"}
            for i in range(9)]
    with pytest.raises(AmbiguousError, match="prompt='s"):
        read(lines(tmp_path / "x.jsonl", [{"said": r["source"], "target": r["target"]}
                                          for r in rows]))


def test_columns_that_come_along_do_not_make_prose_ambiguous(tmp_path):
    rows = [{"id": i, "url": f"http://x/{i}", "title": f"page {i}", "text": f"a page about {i}"}
            for i in range(5)]
    data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
    assert data.task == "language-modelling" and "not read: id, url, title" in str(data)


def test_two_columns_that_belong_together_are_given_together(tmp_path):
    path = lines(tmp_path / "x.jsonl", summaries())
    with pytest.raises(DataError, match="give both"):
        read(path, prompt="document")
    with pytest.raises(DataError, match="completion='sumary' is no column.*'summary'"):
        read(path, prompt="document", completion="sumary")


def test_a_text_file_is_its_paragraphs_or_its_lines(tmp_path):  # newcomer A3
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    data = read(tmp_path / "a.txt", validation=0)
    assert data.train["text"][:] == ["one\ntwo", "three"] and "paragraphs" in str(data)
    assert data.where["train"](1).endswith("line 5")
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    data = read(tmp_path / "b.txt", validation=0)
    assert data.train["text"][:] == ["one", "two"] and "lines" in str(data)
    (tmp_path / "c.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path / "c.txt")


# -- validation ----------------------------------------------------------------------------------
def test_what_is_set_aside_depends_on_the_seed_alone_and_keeps_proportions(tmp_path):
    path = table(tmp_path / "mails.csv", MAILS)
    one, two, other = (read(path, validation=0.2, seed=s) for s in (0, 0, 1))
    assert one.validation["text"][:] == two.validation["text"][:]
    assert one.validation["text"][:] != other.validation["text"][:]
    assert Counter(one.validation["label"][:]) == {0: 6, 1: 2}
    assert not set(one.validation["text"][:]) & set(one.train["text"][:])


def test_a_number_of_rows_may_be_set_aside(tmp_path):
    path = table(tmp_path / "mails.csv", MAILS)
    assert len(read(path, validation=7).validation) == 7
    assert read(path, validation=0).validation is None
    with pytest.raises(ConfigError, match="40 of the 40"):
        read(path, validation=40)


def test_rows_are_still_located_after_setting_aside(tmp_path):
    path = table(tmp_path / "mails.csv", MAILS)
    data = read(path, validation=0.2)
    for split in ("train", "validation"):
        text = data.splits[split]["text"][3]
        number = int(text.split()[1])
        assert data.where[split](3).endswith(f"line {number + 2}")


# -- what is said when it is wrong -----------------------------------------------------------------
def test_missing_files_and_near_names(tmp_path):
    table(tmp_path / "mails.csv", MAILS)
    with pytest.raises(DataError, match="did you mean 'mails.csv'"):
        read(str(tmp_path / "mail.csv"))
    with pytest.raises(DataError, match="nothing at"):
        read("./no/such/place")


def test_empty_things(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("text,label\n")
    (tmp_path / "bare").mkdir()
    for name, words in (("empty.csv", "is empty"), ("head.csv", "no rows"),
                        ("bare", "holds neither pictures")):
        with pytest.raises(DataError, match=words):
            read(tmp_path / name)


def test_an_empty_class_folder_is_named(tmp_path):
    picture(tmp_path / "cat" / "0.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="dog is empty"):
        read(tmp_path)


def test_a_broken_picture_is_named(tmp_path):
    for i in range(3):
        picture(tmp_path / "cat" / f"{i}.png")
        picture(tmp_path / "dog" / f"{i}.png")
    (tmp_path / "dog" / "1.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(DataError, match=r"dog.1\.png cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("row, words", [
    ({"text": "a", "label": None}, "line 3, field 'label': the label is missing"),
    ({"text": "a", "label": float("nan")}, "line 3, field 'label': the label is NaN"),
    ({"text": "a", "label": "NaN"}, "line 3, field 'label': the label is 'NaN'"),
    ({"text": "a", "label": 0.5}, "line 3, field 'label': the label is 0.5"),
    ({"text": "", "label": 1}, "line 3, field 'text': the text is empty"),
    ({"text": None, "label": 1}, "line 3, field 'text': expected text, it is missing"),
    ({"text": 7, "label": 1}, "line 3, field 'text': expected text, it is a int"),
])
def test_a_wrong_value_is_named_by_row_and_field(tmp_path, row, words):
    path = lines(tmp_path / "x.jsonl", [{"text": "a b", "label": 0}, {"text": "a", "label": 1},
                                        row, {"text": "c", "label": 1}])
    with pytest.raises(DataError, match=words):
        read(path, text="text", label="label")


def test_a_csv_row_with_too_many_fields_is_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\nfine,1\nnot, fine,2\n")
    with pytest.raises(DataError, match="line 3: 3 fields where the header names 2"):
        read(path)


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read(path)


def test_a_class_only_validation_knows_is_named(tmp_path):
    lines(tmp_path / "train.jsonl", [{"text": "a", "label": x} for x in ("cat", "dog")])
    lines(tmp_path / "test.jsonl", [{"text": "a", "label": "dgo"}])
    with pytest.raises(DataError, match="'dgo' is not among the training classes; did you mean"):
        read(tmp_path)


def test_labels_that_are_no_classes(tmp_path):
    with pytest.raises(DataError, match="needs two classes"):
        read(lines(tmp_path / "one.jsonl", [{"text": "a", "label": "x"}] * 5))
    with pytest.raises(DataError, match="which are no classes"):
        read(lines(tmp_path / "ids.jsonl", [{"text": "a", "label": i} for i in range(200)]))


@pytest.mark.parametrize("turns, words", [
    ([], "an empty one"),
    ([{"role": "user", "content": "hi"}], "the last turn is user's"),
    ([{"role": "usr", "content": "hi"}], "did you mean 'user'"),
    ([{"role": "user"}, CHAT[1]], r"'messages\[0\]': content is missing"),
])
def test_a_broken_conversation_is_named(tmp_path, turns, words):
    path = lines(tmp_path / "x.jsonl", [{"messages": CHAT}, {"messages": turns}])
    with pytest.raises(DataError, match=words) as e:
        read(path)
    assert "line 2" in str(e.value)


def test_flags_that_name_nothing(tmp_path):
    path = table(tmp_path / "mails.csv", MAILS)
    with pytest.raises(DataError, match="label='lable' is no column.*did you mean 'label'"):
        read(path, label="lable")
    with pytest.raises(ConfigError, match="did you mean 'text-classification'"):
        read(path, task="text-clasification")


def test_three_samples_are_shown(tmp_path):
    data = read(table(tmp_path / "mails.csv", MAILS))
    shown = data.samples()
    assert len(shown) == 3 and "label='spam'" in shown[0] and "word 0 here" in shown[0]


def test_the_fingerprint_follows_the_data(tmp_path):
    one = read(table(tmp_path / "a.csv", MAILS)).fingerprint()
    same = read(table(tmp_path / "b.csv", MAILS)).fingerprint()
    fewer = read(table(tmp_path / "c.csv", MAILS[:-4])).fingerprint()
    assert one == same != fewer
