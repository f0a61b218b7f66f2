"""What a classifier takes for what: the table, the worst rows, and both in the report."""

from __future__ import annotations

import json
import re

import pytest
import torch

import burnish
from burnish.fit.assets import GLYPH_VIT
from burnish.fit.mistakes import KEPT, WHOLE, mistaken


def small(words, **kw):
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, pad_token_id=0, **kw))


HOW = {"max_steps": 2, "batch_size": 8, "quiet": True}


@pytest.mark.parametrize("classes", [2, 5, WHOLE, WHOLE + 1])
def test_rows_are_counted_one_by_one(classes):
    g = torch.Generator().manual_seed(classes)
    said, true = torch.randint(classes, (2, 400), generator=g)
    true[0], said[0] = 0, 1
    lost = torch.rand(400, generator=g)
    names = [f"c{i}" for i in range(classes)]
    found = mistaken(said, true, lost, names)
    rows = list(zip(said.tolist(), true.tolist(), lost.tolist(), strict=True))
    counts = [[sum((s, t) == (j, i) for s, t, _ in rows) for j in range(classes)]
              for i in range(classes)]
    wrong = sorted((-v, i) for i, (s, t, v) in enumerate(rows) if s != t)
    assert found["counts"] == (counts if classes <= WHOLE else [])
    assert (found["wrong"], found["of"]) == (len(wrong), 400)
    assert [(-r["loss"], r["row"]) for r in found["rows"]] == wrong[:KEPT]
    assert all((r["right"], r["said"]) == (names[true[r["row"]]], names[said[r["row"]]])
               for r in found["rows"])
    common = sorted((counts[i][j] for i in range(classes) for j in range(classes) if i != j),
                    reverse=True)[:KEPT]
    assert [p["count"] for p in found["pairs"]] == [c for c in common if c]
    assert all(counts[names.index(p["right"])][names.index(p["said"])] == p["count"]
               for p in found["pairs"])


def test_where_nothing_is_wrong_no_row_is_shown():
    same = torch.tensor([0, 1, 1])
    found = mistaken(same, same, torch.rand(3), ["a", "b"])
    assert (found["wrong"], found["rows"], found["pairs"]) == (0, [], [])
    assert found["counts"] == [[1, 0], [0, 2]]


def test_pictures_that_were_mistaken_are_in_the_report(tmp_path):
    run = burnish.fit(GLYPH_VIT, "digits", "linear_probe", output=tmp_path, **HOW)
    found = json.loads((tmp_path / "run.json").read_text())["mistakes"]
    assert found["split"] == "test" and sum(map(sum, found["counts"])) == found["of"] == 899
    right = sum(line[i] for i, line in enumerate(found["counts"]))
    assert right / 899 == pytest.approx(run.metrics["test"]["accuracy"])
    page = (tmp_path / "report.html").read_text()
    part = page[page.index("Where it is wrong"):]
    part = part[:part.index("</section>")]
    assert f"{found['wrong']} of 899 rows" in part and "which class was taken for which" in part
    for r in found["rows"]:
        assert f"{r['right']}, said {r['said']}" in part
    assert len(re.findall("<img src=.data:image/png", part)) == len(found["rows"]) == KEPT


def test_texts_that_were_mistaken_are_told_in_words(tmp_path, tokenizer):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"a <b> word {i} " + "x " * (200 * (i == 3)),
                                          "label": "ab"[i % 2]}) for i in range(24)))
    one = small(len(tokenizer))
    run = burnish.fit(one, data, "linear_probe", output=tmp_path / "out", validation=12,
                      processor=tokenizer, max_length=24, **HOW)
    found = run.facts["mistakes"]
    assert found["split"] == "validation" and found["of"] == 12
    held = [r["text"] for r in found["rows"]]
    assert held and all(t.startswith("a <b> word") and len(t) <= 240 for t in held)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a &lt;b&gt; word" in page and "<td>a <b> word" not in page


def test_numbers_have_no_classes_to_be_taken_for(tmp_path, tokenizer):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"word {i}", "label": i / 7})
                              for i in range(24)))
    one = small(len(tokenizer), num_labels=1)
    run = burnish.fit(one, data, "linear_probe", output=tmp_path / "out", validation=8,
                      processor=tokenizer, max_length=24, **HOW)
    assert "mistakes" not in run.facts
    assert "Where it is wrong" not in (tmp_path / "out" / "report.html").read_text()


def test_mistakes_are_of_the_task_that_was_looked_at(tmp_path, tokenizer):
    """Of two tasks the first alone has a split to look at."""
    def rows(file, n):
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(json.dumps({"text": f"word {i}", "label": "ab"[i % 2]})
                                  for i in range(n)))

    rows(tmp_path / "one" / "train.jsonl", 16)
    rows(tmp_path / "one" / "validation.jsonl", 9)
    rows(tmp_path / "two" / "train.jsonl", 16)
    run = burnish.fit(small(len(tokenizer)), {"one": tmp_path / "one", "two": tmp_path / "two"},
                      "lora(rank=2) + o_lora", output=tmp_path / "out", validation=0, test=False,
                      processor=tokenizer, max_length=24, **HOW)
    found = run.facts["mistakes"]
    assert (found["task"], found["split"], found["of"]) == ("one", "validation", 9)
    assert "Where it is wrong" in (tmp_path / "out" / "report.html").read_text()
