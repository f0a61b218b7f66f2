"""Losses, figures and answers of every task, beside transformers' own and beside the plain way."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, mean_absolute_error, r2_score

from burnish.core.errors import DataError
from burnish.fit.data import read
from burnish.fit.tasks import TASKS, evaluate, task_for
from burnish.fit.tasks.spans import LONGEST, best, overlap, plain
from burnish.fit.tasks.tokens import spans

CONTEXT = "the glaze is fired at 1060 degrees and the clay at 950 before it"


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


ROWS = {
    "text-classification": [{"text": t, "label": y} for t, y in zip("abcdef", "xyxyzx",
                                                                    strict=True)],
    "text-multi-label": [{"text": t, "label": list(y)} for t, y in zip(
        "abcde", ("x", "", "xy", "z", "yz"), strict=True)],
    "text-regression": [{"text": t, "label": i * 0.3 + 0.1} for i, t in enumerate("abcdef")],
    "token-classification": [{"tokens": ["ab", "c", "d"], "tags": ["B-x", "O", "I-x"]},
                             {"tokens": ["c"], "tags": ["B-y"]}, {"tokens": ["d", "e"], "tags": [
                                 "B-y", "I-y"]}],
    "question-answering": [{"question": "hot", "context": CONTEXT, "answers": a} for a in (
        "1060 degrees", "950", [], "the clay")],
}
MODELS = {"text-classification": "BertForSequenceClassification",
          "text-multi-label": "BertForSequenceClassification",
          "text-regression": "BertForSequenceClassification",
          "token-classification": "BertForTokenClassification",
          "question-answering": "BertForQuestionAnswering"}


@pytest.fixture
def made(tmp_path, tokenizer):
    """task -> (the task over its rows, a small BERT for it)."""
    import transformers

    tokenizer.padding_side = "right"

    def build(name):
        task = task_for(read(lines(tmp_path / "x.jsonl", ROWS[name]), task=name, validation=0,
                             **({"text": "tokens", "label": "tags"} if "token" in name else {})),
                        "", processor=tokenizer, max_length=40)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
            **{k: v for k, v in task.head().items() if k != "ignore_mismatched_sizes"})
        torch.manual_seed(0)
        return task, getattr(transformers, MODELS[name])(config).eval()
    return build


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_is_transformers_own(made, name):
    """Both the loss that a step takes and the mean of rows' losses that an evaluation says."""
    task, model = made(name)
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        out = model(**batch)
        right = task.right(batch)
        assert torch.allclose(task.loss(out, right), out.loss, atol=1e-6)
        losses = task.losses(task.logits(model(**task.feed(batch))), right)
        figures = evaluate(model, task, "train", 2)
    assert losses.shape == (len(rows), 2)
    assert (losses[:, 0].sum() / losses[:, 1].sum()).item() == pytest.approx(out.loss.item(),
                                                                            abs=1e-6)
    assert figures["loss"] == pytest.approx(out.loss.item(), abs=1e-6)   # however rows are batched


def test_every_task_that_is_served_has_a_test_here_or_elsewhere():
    elsewhere = {"semantic-segmentation", "speech-recognition", "audio-classification",
                 "speech-to-text", "image-text-contrastive", "image-captioning", "object-detection",
                 "time-series-forecasting",
                 "image-generation", "text-to-image", "text-segmentation",
                 *(f"{of}-{what}" for of in ("cloud", "graph")
                   for what in ("classification", "multi-label", "regression")),
                 "unpaired-preference-tuning",
                 "audio-multi-label", "audio-regression",
                 "image-classification", "image-multi-label", "image-regression",
                 "image-embedding",
                 "language-modelling", "masked-language-modelling", "instruction-tuning",
                 "masked-instruction-tuning",
                 "sequence-to-sequence", "preference-tuning", "embedding"}
    assert set(TASKS) == elsewhere | set(ROWS)


# -- figures ---------------------------------------------------------------------------------------
def test_figures_of_several_labels_are_scikit_learns(made):
    task, _ = made("text-multi-label")
    g = torch.Generator().manual_seed(0)
    said, true = (torch.randint(2, (50, 3), generator=g) for _ in range(2))
    got = task.measure(said, true)
    assert got["f1"] == pytest.approx(f1_score(true, said, average="micro"))
    assert got["f1_macro"] == pytest.approx(f1_score(true, said, average="macro"))
    assert got["accuracy"] == pytest.approx((said == true).all(1).double().mean().item())
    assert task.measure(torch.zeros(4, 3), torch.zeros(4, 3))["f1"] == 0.0


def test_figures_of_numbers_are_scikit_learns(made):
    task, _ = made("text-regression")
    g = torch.Generator().manual_seed(0)
    said, true = (torch.randn(40, generator=g) for _ in range(2))
    got = task.measure(said, true)
    assert got["mae"] == pytest.approx(mean_absolute_error(true, said))
    assert got["r2"] == pytest.approx(r2_score(true, said))
    assert got["spearman"] == pytest.approx(spearmanr(true, said).statistic)
    assert set(task.measure(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))) == {"mae", "r2"}


@pytest.mark.parametrize("tags, found", [
    ("B-x I-x O B-y", [("x", 0, 2), ("y", 3, 4)]), ("I-x I-x", [("x", 0, 2)]),
    ("B-x B-x I-x", [("x", 0, 1), ("x", 1, 3)]), ("B-x I-y O", [("x", 0, 1), ("y", 1, 2)]),
    ("O O", []), ("O B-x", [("x", 1, 2)]), ("", []),
    ("B-x I-x E-x O S-y", [("x", 0, 3), ("y", 4, 5)]),
    ("B-x L-x U-x U-x", [("x", 0, 2), ("x", 2, 3), ("x", 3, 4)]), ("S-x I-x", [("x", 0, 1),
                                                                           ("x", 1, 2)])])
def test_spans_are_counted_as_the_conll_script_does(tags, found):
    assert list(spans(tags.split())) == found


def test_spans_count_whole(made):
    task, _ = made("token-classification")
    number = {n: i for i, n in enumerate(task.data.labels)}
    true = torch.tensor([[number[t] for t in "B-x O I-x B-y".split()], [-100, number["B-y"],
                                                                     number["I-y"], -100]])
    said = torch.tensor([[number[t] for t in "B-x O O B-y".split()], [0, number["B-y"],
                                                                   number["O"], 0]])
    got = task.measure(said, true)                 # found: x, y, a y too short; there: x, x, y, y
    assert got["precision"] == pytest.approx(2 / 3) and got["recall"] == pytest.approx(2 / 4)
    assert got["f1"] == pytest.approx(2 * 2 / 7) and got["accuracy"] == pytest.approx(4 / 6)


def test_a_word_of_several_tokens_has_one_tag(made, tokenizer):
    task, _ = made("token-classification")
    rows = task.rows("train")
    number = {n: i for i, n in enumerate(task.data.labels)}
    words = [task.data.train[0]["tokens"], rows[0]["labels"]]
    assert tokenizer.decode(rows[0]["input_ids"]) == "abcd" and words[0] == ["ab", "c", "d"]
    assert words[1] == [number["B-x"], -100, number["O"], number["I-x"]]


# -- questions -------------------------------------------------------------------------------------
def test_the_places_of_an_answer_are_its_tokens(made, tokenizer):
    task, _ = made("question-answering")
    rows = task.rows("train")
    seen = set()
    for i in range(len(rows)):
        row, which = rows[i], rows.question[i]
        begin, end = row["start_positions"], row["end_positions"]
        right = rows.right[which]
        if (begin, end) == (0, 0):
            whole = tokenizer.decode(row["input_ids"])
            assert not right or right[0] not in whole.removeprefix("hot")
            continue
        assert tokenizer.decode(row["input_ids"][begin:end + 1]) == right[0]
        assert rows.text(i)[rows.places[i][begin][0]:rows.places[i][end][1]] == right[0]
        seen.add(which)
    assert seen == {0, 1, 3} and len(rows) > len(rows.right)       # windows overlap


def test_answers_stand_where_they_are_said_to_whatever_the_side_of_padding(made, tokenizer):
    task, _ = made("question-answering")
    tokenizer.padding_side = "left"
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(len(rows))])
    for ids, begin, end, i in zip(batch["input_ids"], batch["start_positions"],
                                  batch["end_positions"], range(len(rows)), strict=True):
        if (begin, end) != (0, 0):
            assert tokenizer.decode(ids[begin:end + 1]) == rows.right[rows.question[i]][0]


def test_a_question_too_long_for_a_context_is_named(tmp_path, tokenizer):
    rows = [{"question": "hot", "context": CONTEXT, "answers": "1060"},
            {"question": "h" * 39, "context": CONTEXT, "answers": "1060"}]
    data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
    with pytest.raises(DataError, match="line 2: the question has 39 tokens"):
        task_for(data, "", processor=tokenizer, max_length=40).rows("train")
    assert len(task_for(data, "", processor=tokenizer, max_length=44).rows("train")) > 2


def test_the_likeliest_stretch_is_the_one_that_trying_all_finds(made):
    task, _ = made("question-answering")
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(len(rows))])
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        logits = torch.randn(*batch["input_ids"].shape, 2, generator=g)
        said = best(task.reduce(logits, task.right(batch)), rows)
        for which, text in enumerate(said):
            windows = [i for i, q in enumerate(rows.question) if q == which]
            none = min(float(logits[i, 0].sum()) for i in windows)
            found = max(((float(logits[i, b, 0] + logits[i, c, 1]), i, b, c)
                         for i in windows for b, c in itertools.product(rows.places[i], repeat=2)
                         if b <= c < b + LONGEST), default=None)
            score, i, b, c = found
            wanted = rows.text(i)[rows.places[i][b][0]:rows.places[i][c][1]]
            assert text == ("" if none > score else wanted)


def test_answers_are_compared_as_squad_does():
    assert plain("The  Quick, brown-Fox!") == "quick brownfox"
    assert overlap("the big car", "a car") == pytest.approx(2 * 1 / 3)
    assert overlap("", "") == 1.0 and overlap("the", "") == 1.0 and overlap("car", "") == 0.0
    assert overlap("red red", "red") == pytest.approx(2 * 1 / 3)


def test_a_question_with_several_right_answers_is_met_by_any(tmp_path, tokenizer):
    rows = [{"question": "hot", "context": CONTEXT, "answers": {
        "text": ["1060", "1060 degrees"], "answer_start": [22, 22]}}]
    task = task_for(read(lines(tmp_path / "x.jsonl", rows), validation=0), "",
                    processor=tokenizer, max_length=80)
    made = task.rows("train")
    batch = task.collate([made[0]])
    logits = torch.full((*batch["input_ids"].shape, 2), -9.0)
    last = next(t for t, (_, b) in made.places[0].items() if CONTEXT[:b].endswith("degrees"))
    logits[0, batch["start_positions"][0], 0] = logits[0, last, 1] = 9.0
    right = task.right(batch)
    got = task.figures(task.reduce(logits, right), task.losses(logits, right), right, made)
    assert got["exact_match"] == got["f1"] == 1.0
