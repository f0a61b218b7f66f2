"""Every task that fit serves, from a file to an answer: small models with real tokenizers learn
what stands in the rows, are opened again, and say it."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError

pytestmark = pytest.mark.slow

WORDS = ("ada alan grace york rome paris met in the went to red big loud car house good bad fine "
         "very what who is it answer colour : . yes no blue green one two three four five").split()


def tokenizer(kind):
    """A word a token, with the marks that models of this kind read."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {t: i for i, t in enumerate([*names, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    else:
        raw.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)])
        marks = {"eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]",
                                   **marks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> the folder of a model drawn at random."""
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    out = {}
    size = len(WORDS) + 5
    bert = BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                      intermediate_size=64, max_position_embeddings=32, pad_token_id=0,
                      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    t5 = T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                  pad_token_id=0, eos_token_id=3, decoder_start_token_id=0, dropout_rate=0.0)
    torch.manual_seed(0)
    for kind, model in (("bert", BertForMaskedLM(bert)), ("t5", T5ForConditionalGeneration(t5))):
        out[kind] = folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tokenizer(kind).save_pretrained(folder)
    return out


def file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return str(path)


def drawn(make, count=320):
    draw = random.Random(0)
    return [make(draw) for _ in range(count)]


PEOPLE, PLACES = ("ada", "alan", "grace"), ("york", "rome", "paris")


def named(d):
    a, b = d.choice(PEOPLE), d.choice(PLACES)
    return d.choice([{"tokens": [a, "went", "to", "the", b], "tags": ["B-PER", "O", "O", "O",
                                                                      "B-LOC"]},
                     {"tokens": ["in", b, "it", "is", "good"], "tags": ["O", "B-LOC", "O", "O",
                                                                        "O"]}])


def several(d):
    is_ = [w for w in ("red", "big", "loud") if d.random() < 0.5]
    return {"text": " ".join(["the", *is_, d.choice(("car", "house"))]), "label": is_}


def rated(d):
    good = d.randint(0, 4)
    words = ["good"] * good + ["bad"] * (4 - good)
    d.shuffle(words)
    return {"text": " ".join(["it", "is", *words]), "label": 0.25 * good + 0.1}


def asked(d):
    said = d.choice(("red", "blue", "green"))
    fill = [d.choice(("the", "car", "house", "very")) for _ in range(d.randint(1, 8))]
    return {"question": "what colour is it", "context": " ".join([*fill, "answer", ":", said, "."]),
            "answers": said}


def told(d):
    a = d.choice(PEOPLE)
    return {"text": f"{a} went to {dict(zip(PEOPLE, PLACES, strict=True))[a]} . "}


def answered(d):
    a = d.choice(PEOPLE)
    return {"prompt": f"who went to {dict(zip(PEOPLE, PLACES, strict=True))[a]} :", "completion": a}


#: passes over the rows, where eight do not do: gaps are few in rows that run end to end
EPOCHS = {"text-multi-label": 16, "masked-language-modelling": 30}

#: task: (model, rows, figure, at least so much, an input, what is in its answer)
CASES = {
    "token-classification": ("bert", named, "f1", 0.9, "grace went to the york",
                             "grace/B-PER went to the york/B-LOC"),
    "text-multi-label": ("bert", several, "f1", 0.9, "the big house", "big ("),
    "text-regression": ("bert", rated, "spearman", 0.8, "it is good good good good", "1."),
    "question-answering": ("bert", asked, "f1", 0.8, json.dumps(
        {"question": "what colour is it", "context": "the car answer : blue ."}), "blue"),
    "masked-language-modelling": ("bert", told, "token_accuracy", 0.5, "ada [MASK] to york .",
                                  "ada went to york"),
    "masked-instruction-tuning": ("bert", answered, "accuracy", 0.9, "who went to rome :", "alan"),
    "sequence-to-sequence": ("t5", answered, "token_accuracy", 0.9, "who went to rome :", "alan"),
}


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """task -> (its finished run, its data), made when it is asked for."""
    made = {}

    def run(task):
        if task not in made:
            kind, make, *_ = CASES[task]
            folder = tmp_path_factory.mktemp(task)
            data = file(folder, drawn(make))
            made[task] = burnish.fit(str(folders[kind]), data, "full", output=folder / "out",
                                     lr=3e-3, epochs=EPOCHS.get(task, 8), batch_size=16,
                                     max_length=24, quiet=True), data
        return made[task]
    return run


@pytest.mark.parametrize("task", CASES)
def test_a_task_is_told_by_its_rows_learnt_and_promised(runs, task):
    run, _ = runs(task)
    _, _, figure, least, *_ = CASES[task]
    assert run.facts["data"]["task"] == task
    assert run.metrics["validation"][figure] >= least, run.metrics
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moments = run.facts["memory"]["moments"]["evaluate"]
    assert moments["promised"] == moments["measured"]


@pytest.mark.parametrize("task", CASES)
def test_a_run_is_opened_again_and_answers(runs, task, capsys):
    run, data = runs(task)
    *_, given, words = CASES[task]
    assert main(["predict", str(run.folder), given]) == 0
    assert words in capsys.readouterr().out.removeprefix(f"{given}: ")
    assert main(["predict", str(run.folder), given, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["input"] == given and words in answer["said"]
    assert main(["evaluate", str(run.folder), data, "--split", "validation", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    figure = CASES[task][2]
    assert found["these"] == "held out by this run"
    assert found["tuned"][figure] == pytest.approx(run.metrics["validation"][figure], abs=1e-9)


@pytest.mark.parametrize("task", CASES)
def test_rows_of_a_table_are_answered_one_by_one(runs, task, capsys, tmp_path):
    run, data = runs(task)
    rows = [json.loads(line) for line in open(data)][:3]
    if task == "masked-language-modelling":
        rows = [{"text": r["text"].replace("went", "[MASK]")} for r in rows]
    assert main(["predict", str(run.folder), file(tmp_path, rows), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [a["input"].rpartition(", ")[2] for a in answers] == ["line 1", "line 2", "line 3"]
    assert main(["predict", str(run.folder), file(tmp_path, [{"other": "x"}])]) == 2
    assert "there is no" in capsys.readouterr().err


def test_a_question_alone_is_no_question(runs, capsys):
    run, _ = runs("question-answering")
    assert main(["predict", str(run.folder), "what colour is it"]) == 2
    assert "a question and a context" in capsys.readouterr().err


def test_a_text_without_a_gap_has_none_to_fill(runs, capsys):
    run, _ = runs("masked-language-modelling")
    assert main(["predict", str(run.folder), "ada went to york ."]) == 2
    assert "there is no [MASK]" in capsys.readouterr().err


def test_an_answer_in_a_long_context_is_found_in_its_window(runs):
    from burnish.fit.finished import Finished

    run, _ = runs("question-answering")
    long = " ".join(["house"] * 40 + ["answer", ":", "green", "."] + ["car"] * 30)
    (said,) = Finished.open(run.folder).predict(
        [json.dumps({"question": "what colour is it", "context": long})])
    assert said["text"] == "green"


def test_a_run_without_unanswerable_questions_answers_every_question(runs, monkeypatch):
    """It could say that the context does not, which nothing had taught it."""
    from burnish.fit.finished import Finished
    from burnish.fit.tasks import spans

    run, _ = runs("question-answering")
    assert json.loads((run.folder / "run.json").read_text())["task"] == {"unanswerable": False}
    reduce = spans.QuestionAnswering.reduce

    def nowhere(self, logits, labels):
        kept = reduce(self, logits, labels)
        kept[..., 1, -1] = 1e6                               # the first token's
        return kept

    monkeypatch.setattr(spans.QuestionAnswering, "reduce", nowhere)
    row = json.dumps({"question": "what colour is it", "context": "the answer : green . car"})
    finished = Finished.open(run.folder)
    assert next(iter(finished.predict([row])))["text"]
    finished.task.how["unanswerable"] = True
    assert not next(iter(finished.predict([row])))["text"]


def test_labels_are_smoothed_only_where_there_are_classes(folders, tmp_path):
    data = file(tmp_path, drawn(rated, 20))
    with pytest.raises(ConfigError, match="label_smoothing_factor=0.1 .*text-regression has no"):
        burnish.fit(str(folders["bert"]), data, "full", output=tmp_path / "out",
                    label_smoothing_factor=0.1, quiet=True)


def test_other_words_are_hidden_in_every_pass_and_again_when_resumed(folders, tmp_path):
    from burnish.fit.data import read
    from burnish.fit.order import Shuffled
    from burnish.fit.places import suited
    from burnish.fit.tasks import task_for

    data = file(tmp_path, drawn(told, 40))
    how = {"lr": 1e-3, "batch_size": 4, "max_length": 12, "quiet": True, "measure": False,
           "report": False, "max_steps": 20, "save_steps": 10, "save_total_limit": 5}
    whole = burnish.fit(str(folders["bert"]), data, "full", output=tmp_path / "a", **how)
    shutil.copytree(tmp_path / "a" / "checkpoint-10", tmp_path / "b" / "checkpoint-10")
    again = burnish.fit(str(folders["bert"]), data, "full", output=tmp_path / "b", resume=True,
                        **how)
    for (n, a), (_, b) in zip(whole.tuned.model.named_parameters(),
                              again.tuned.model.named_parameters(), strict=True):
        assert torch.equal(a, b), n

    task = task_for(suited(read(data), str(folders["bert"])), str(folders["bert"]), max_length=12)
    rows, held, order = task.rows("train"), task.rows("validation"), []
    sampler = Shuffled(len(rows), 0, rows.redrawn)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order.append({i % len(rows): rows[i]["input_ids"] for i in sampler})
    assert all(set(o) == set(range(len(rows))) for o in order)
    assert order[0] != order[1] != order[2]                      # others each time
    assert rows[0] == rows[0] and not held.redrawn
    asked = [y for p in order for i in p for y in rows[i]["labels"]]
    assert 0.08 < sum(y != -100 for y in asked) / len(asked) < 0.25
