"""Masked language models that answer: what is hidden, what is learnt, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.places import suited
from burnish.fit.tasks import evaluate, task_for

ROWS = [{"prompt": "how hot", "completion": "red"}, {"prompt": "the [MASK] sea", "completion": "a"},
        {"prompt": "who [MASK]", "completion": "c d"}, {"prompt": "e", "completion": "f"}]


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


def made(tmp_path, tokenizer, rows=ROWS, **how):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = read(str(file), validation=0, task="masked-instruction-tuning")
    task = task_for(data, "", processor=tokenizer, **how)
    return task


def net(tokenizer):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=0)).eval()


def test_an_answer_has_a_mask_for_every_token_where_it_belongs(tmp_path, tokenizer):
    task = made(tmp_path, tokenizer)
    rows, mask = task.rows("train"), tokenizer.mask_token_id
    for i, given in enumerate(ROWS):
        row = rows[i]
        ids, labels = (torch.as_tensor(row[k]) for k in ("input_ids", "labels"))
        answer = tokenizer(given["completion"], add_special_tokens=False)["input_ids"]
        assert labels[ids == mask].tolist() == answer
        assert (labels[ids != mask] == -100).all()
        shown = given["prompt"] if "[MASK]" in given["prompt"] else given["prompt"] + " [MASK]"
        assert ids.tolist() == tokenizer(
            shown.replace("[MASK]", "[MASK]" * len(answer)))["input_ids"]


def test_only_the_answer_is_learnt_and_an_answer_is_right_as_a_whole(tmp_path, tokenizer):
    task, model = made(tmp_path, tokenizer), net(tokenizer)
    batch = task.collate([task.rows("train")[i] for i in range(4)])
    with torch.no_grad():
        out = model(**batch)
        want, asked = 0.0, 0
        logits = out.logits.double().log_softmax(-1)
        for r in range(4):
            for t in range(batch["labels"].shape[1]):
                if (y := int(batch["labels"][r, t])) != -100:
                    want, asked = want - float(logits[r, t, y]), asked + 1
    assert float(out.loss) == pytest.approx(want / asked, rel=1e-5)
    assert evaluate(model, task, "train", 2)["loss"] == pytest.approx(want / asked, rel=1e-5)
    labels = torch.tensor([[-100, 3, 4], [-100, 5, -100]])
    said = torch.tensor([[9, 3, 9], [9, 5, 9]])
    found = task.measure(said, labels)
    assert found["accuracy"] == 0.5 and found["token_accuracy"] == pytest.approx(2 / 3)


def test_what_is_said_stands_behind_the_mask(tmp_path, tokenizer):
    task, model = made(tmp_path, tokenizer), net(tokenizer)
    for text, shown in (("how hot", "how hot [MASK]"), ("a [MASK][MASK] b", "a [MASK][MASK] b")):
        coded = tokenizer(shown, return_tensors="pt")
        with torch.no_grad():
            p = model(**coded).logits[0].double().softmax(-1)
            got = task.answer(model, {"text": text}, 8)
        best = p[coded["input_ids"][0] == tokenizer.mask_token_id].max(-1)
        assert got["text"] == tokenizer.decode(best.indices).strip()
        assert got["probability"] == pytest.approx(float(best.values.prod()), rel=1e-5)


def test_rows_that_cannot_be_asked_are_named(tmp_path, tokenizer):
    for row in ({"prompt": "[MASK] or [MASK]", "completion": "a"},
                {"prompt": "a", "completion": "[MASK]"}):
        with pytest.raises(DataError, match=r"row 1: expected an answer .* \[MASK\] once"):
            made(tmp_path, tokenizer, [ROWS[0], row]).rows("train")
    task = made(tmp_path, tokenizer, [*ROWS, {"prompt": "a " * 40, "completion": "b"}],
                max_length=16)
    assert len(task.rows("train")) == 4 and task.rows("train").source(3) == 3
    assert any("1 of 5 rows are longer than max_length=16" in n for n in task.notes)
    with pytest.raises(DataError, match="no row fits into max_length=2"):
        made(tmp_path, tokenizer, max_length=2).rows("train")


def test_an_encoder_is_given_instructions_so_and_others_are_refused(tmp_path, tokenizer):
    from burnish.testing import tiny

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    data = read(str(file), validation=0)
    assert suited(data, net(tokenizer)).task == "masked-instruction-tuning"
    assert suited(data, tiny("t5")[0]).task == "sequence-to-sequence"
    assert suited(data, tiny("llama")[0]).task == "instruction-tuning"
    bare = type(tokenizer).from_pretrained(_saved(tokenizer, tmp_path))
    bare.mask_token = None
    with pytest.raises(ConfigError, match="tokenizer's mask, and this one has none"):
        made(tmp_path, bare)


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder / "tok")
    return folder / "tok"
