"""A run promises the peak of every moment before it begins, and reports what each really took."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import burnish
from burnish.fit.moments import Moments
from burnish.formats import safe

SMALL = {"max_steps": 2, "batch_size": 8, "test": False}
RECIPES = ["nf4 + lora(rank=2)", "lora(rank=2)", "full", "snella(rank=2)",
           "lora(rank=2) + checkpoint", "mezo + lora(rank=2)"]


def folder_of(kind, where, tokenizer):
    """A model folder and data for it."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )
    torch.manual_seed(0)
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=64))
        row = {"text": "ab ", "label": 0}
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            bos_token_id=1, eos_token_id=2, pad_token_id=0))
        row = {"prompt": "a", "completion": "b "}
    model.save_pretrained(where / kind)
    tokenizer.save_pretrained(where / kind)
    key = list(row)[0] if kind == "bert" else "completion"
    lines = [json.dumps({**row, key: row[key] * (3 + i % 9)} | (
        {"label": i % 2} if kind == "bert" else {})) for i in range(40)]
    (where / "x.jsonl").write_text("\n".join(lines) + "\n")
    return str(where / kind), where / "x.jsonl"


def held_to(run, recipe):
    """Every moment, promised and measured, within the usual tolerance."""
    found = run.facts["memory"]["moments"]
    assert list(found) == ["load", "train", "evaluate", "save", "merge"]
    for moment, told in found.items():
        assert told["promised"] > 0
        if moment == "merge" and told["measured"] is None:      # more than the run has taken
            assert told["promised"] > max(m["measured"] or 0 for m in found.values())
            continue
        assert told["promised"] == pytest.approx(told["measured"], rel=0.03), moment
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_picture_model_keeps_all_five(glyph_vit, tmp_path, recipe):
    run = burnish.fit(glyph_vit, "digits", recipe, output=tmp_path, report=False, quiet=True,
                      **SMALL)
    held_to(run, recipe)


@pytest.mark.parametrize("kind, recipe", [
    ("bert", "full"), ("bert", "nf4 + lora(rank=2)"), ("llama", "lora(rank=2)"),
    ("llama", "nf4 + lora(rank=2)"), ("llama", "lora(rank=2) + checkpoint")])
def test_a_text_model_keeps_all_five(kind, recipe, tmp_path, tokenizer):
    model, data = folder_of(kind, tmp_path, tokenizer)
    run = burnish.fit(model, data, recipe, output=tmp_path / "out", validation=16, report=False,
                      quiet=True, per_device_eval_batch_size=16, **SMALL)
    found = held_to(run, recipe)
    if kind == "llama":                       # the logits of what is looked at are made and read
        words = len(tokenizer)
        assert found["evaluate"]["promised"] > 16 * 20 * words * 4


def test_text_file_and_page_say_all_of_it(glyph_vit, tmp_path, capsys):
    run = burnish.fit(glyph_vit, "digits", "lora(rank=2)", output=tmp_path, **SMALL)
    said = capsys.readouterr().out
    before, _, after = said.partition("written to")
    assert all(f"{m} " in before for m in ("load", "train", "evaluate", "save", "merge"))
    assert "promised beside the step:\n  load  " in before
    kept = safe.read_json(tmp_path / "run.json")["memory"]["moments"]
    assert kept == run.facts["memory"]["moments"]
    page = (tmp_path / "report.html").read_text()
    assert "<th>moment</th>" in page and "<td>merge</td>" in page
    # what was merged to be measured is as it was
    assert run.tuned.merged is None
    from burnish.fit.data import read
    from burnish.fit.tasks import task_for
    other = burnish.load(task_for(read("digits"), glyph_vit).load(glyph_vit), tmp_path)
    x = torch.randn(2, *_picture(run.tuned.model))
    with torch.no_grad():
        assert torch.equal(run.tuned.model.eval()(x).logits, other.model.eval()(x).logits)


def _picture(model):
    config = model.config
    return config.num_channels, config.image_size, config.image_size


def test_nothing_is_measured_where_nobody_wants_it(glyph_vit, tmp_path):
    run = burnish.fit(glyph_vit, "digits", "lora(rank=2)", output=tmp_path, report=False,
                      quiet=True, measure=False, **SMALL)
    told = run.facts["memory"]["moments"]
    assert all(m["promised"] and m["measured"] is None for m in told.values())


def test_the_larger_of_reading_and_joining_is_the_load():
    moments = Moments()
    moments.will("load", 5)
    moments.will("load", 3)
    assert moments.to_dict() == {"load": {"promised": 5, "measured": None}}


def test_a_merge_that_takes_more_than_the_run_is_left_alone(monkeypatch):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    tuned = burnish.tune(net, "lora(rank=2)", head=False)
    moments = Moments(promised={"merge": 100}, measured={"train": 99})
    monkeypatch.setattr(tuned, "merge", lambda: pytest.fail("merged"))
    moments.merges(tuned)
    assert "merge" not in moments.measured
