"""Answers while a run goes: of the same rows each time, and the run is the one without them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import burnish
from burnish.core.errors import ConfigError
from burnish.fit.data import read
from burnish.fit.shown import _Near, posed
from burnish.fit.tasks import task_for

RUN = dict(recipe="lora(rank=2)", max_steps=4, batch_size=8, eval_steps=2, save_steps=2, quiet=True,
           measure=False, report=False, test=False)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def digits():
    found = read("digits")
    found.splits = {k: v.select(range(24)) for k, v in found.splits.items() if k != "test"}
    return found


def test_a_run_with_answers_is_the_run_without_them(glyph_vit, digits, tmp_path):
    plain = burnish.fit(glyph_vit, digits, output=tmp_path / "plain", **RUN)
    told = burnish.fit(glyph_vit, digits, output=tmp_path / "told", samples=3, **RUN)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "told"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [h.get("loss") for h in plain.history] == [h.get("loss") for h in told.history]
    assert not (tmp_path / "plain/answers.jsonl").exists()
    found = lines(tmp_path / "told/answers.jsonl")
    assert [r["step"] for r in found] == [2, 4]             # once each, whatever is evaluated after
    rows = digits.validation
    for r in found:
        assert [x["right"] for x in r["answers"]] == [
            digits.labels[rows[i]["label"]] for i in (0, 8, 16)]
        assert all(x["asked"] == "a picture of 8 x 8" for x in r["answers"])
    # the last line is what the tuned model says of these rows
    if told.facts["best"]["step"] == 4:
        task = task_for(digits, glyph_vit)
        model = told.tuned.model.eval()
        with torch.no_grad():
            said = [task.said(task.answer(model, {"image": rows[i]["image"]}, 1))
                    for i in (0, 8, 16)]
        assert [x["said"] for x in found[-1]["answers"]] == said


def test_a_run_that_goes_on_has_each_step_once(glyph_vit, digits, tmp_path):
    out = tmp_path / "out"
    burnish.fit(glyph_vit, digits, output=out, samples=2, **RUN)
    (out / "answers.jsonl").open("a").write('{"step": 9, "answers": []}\n{"step"')
    burnish.fit(glyph_vit, digits, output=out, samples=2, resume=True, **(RUN | {"max_steps": 6}))
    assert [r["step"] for r in lines(out / "answers.jsonl")] == [2, 4, 6]


def test_what_cannot_answer_is_refused(glyph_vit, digits, tmp_path):
    alone = read(digits)
    alone.splits = {"train": digits.train}
    with pytest.raises(ConfigError, match="samples=2 are rows of the validation split"):
        burnish.fit(glyph_vit, alone, output=tmp_path / "a", samples=2,
                    **{k: v for k, v in RUN.items() if k != "eval_steps"})
    with pytest.raises(ConfigError, match="samples=-1: expected 0 or more"):
        burnish.fit(glyph_vit, digits, output=tmp_path / "b", samples=-1, **RUN)


TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Who?"},
         {"role": "assistant", "content": "She."}, {"role": "user", "content": "When?"}]


def task(name, takes=("text",), labels=None, said=lambda a: str(a["text"])):
    return SimpleNamespace(data=SimpleNamespace(task=name, labels=labels, keys=("task",)),
                           parted=lambda row: None, takes=takes, said=said, word="",
                           posed=lambda row: {k: row[k] for k in takes if k in row},
                           processor=SimpleNamespace(mask_token="[MASK]"))


@pytest.mark.parametrize(("kind", "row", "asked", "right"), [
    (task("instruction-tuning"), {"messages": TURNS}, {"text": "Who?"}, "She."),
    (task("preference-tuning"), {"chosen": TURNS, "rejected": TURNS}, {"text": "Who?"}, "She."),
    (task("instruction-tuning"), {"prompt": "a", "completion": "b"}, {"text": "a"}, "b"),
    (task("preference-tuning"), {"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "a"},
     "b"),
    (task("language-modelling"), {"text": "a b c d e"}, {"text": "a b"}, "c d"),
    (task("language-modelling"), {"text": "a"}, {"text": "a"}, ""),
    (task("masked-language-modelling"), {"text": "a b c"}, {"text": "a [MASK] c"}, "b"),
    (task("text-classification", ("text", "pair"), ("x", "y")), {"text": "a", "label": 1},
     {"text": "a"}, "y"),
    (task("text-multi-label", labels=("x", "y")), {"text": "a", "label": [0, 1]}, {"text": "a"},
     "x, y"),
    (task("text-multi-label", labels=("x", "y")), {"text": "a", "label": []}, {"text": "a"},
     "none"),
    (task("text-regression"), {"text": "a", "label": 0.25}, {"text": "a"}, "0.25"),
    (task("question-answering", ("question", "context")),
     {"question": "q", "context": "c", "answers": {"text": ["t"], "answer_start": [0]}},
     {"question": "q", "context": "c"}, "t"),
    (task("token-classification", ("tokens",), ("O", "B-x"), lambda a: " ".join(a["tags"])),
     {"tokens": ["a", "b"], "tags": [0, 1]}, {"tokens": ["a", "b"]}, "O B-x"),
], ids=lambda v: getattr(getattr(v, "data", None), "task", ""))
def test_a_row_is_a_question_with_its_answer(kind, row, asked, right):
    found = posed(kind, {**row, "task": 3})
    assert found.row == asked and found.right == right and found.keys == {"task": 3}
    assert all(part in found.asked for v in asked.values() for part in v)


def test_a_model_elsewhere_answers_here():
    """Everything that goes in is there, everything that comes out is here."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    class There(torch.nn.Module):
        def forward(self, input_ids):
            assert input_ids.device.type == "meta"
            return SequenceClassifierOutput(logits=torch.ones(1, 2), hidden_states=(input_ids,))

        def generate(self, input_ids, max_new_tokens):
            assert input_ids.device.type == "meta" and max_new_tokens == 3
            return torch.ones(1, 4)

    near = _Near(There(), "meta")
    with pytest.raises(NotImplementedError):                # a meta tensor cannot come back
        near(input_ids=torch.ones(1, 2))
    near = _Near(torch.nn.Module(), "cpu")
    near.model.forward = lambda input_ids: SequenceClassifierOutput(logits=input_ids * 2)
    out = near(input_ids=torch.ones(1, 2))
    assert out.logits.tolist() == [[2, 2]] and isinstance(out, SequenceClassifierOutput)
    assert _Near(There(), "meta").generate(input_ids=torch.ones(1, 2),
                                           max_new_tokens=3).tolist() == [[1, 1, 1, 1]]


def test_a_line_of_metrics_has_the_device_s_peak_where_there_is_one(tmp_path, monkeypatch):
    from burnish.fit import watch

    leg, state = SimpleNamespace(before=5, name=""), SimpleNamespace(
        is_world_process_zero=True, global_step=1)
    told = watch.Metrics(tmp_path / "metrics.jsonl", None, leg)
    for peak in (None, 123):
        monkeypatch.setattr(watch, "device_peak", lambda p=peak: p)
        told.on_log(None, state, None, {"loss": 1.0})
    first, second = lines(tmp_path / "metrics.jsonl")
    assert "device_peak" not in first and second["device_peak"] == 123 and second["step"] == 6
