"""From rows to batches and from answers to figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score
from torch import nn

import burnish
from burnish.core.errors import ConfigError, DataError
from burnish.fit.assets import GLYPH_VIT
from burnish.fit.data import read
from burnish.fit.heads import resize_head
from burnish.fit.pictures import Picture, processor_of
from burnish.fit.tasks import task_for
from burnish.fit.tasks.classes import classification


def lines(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


# -- pictures --------------------------------------------------------------------------------------
def test_pictures_are_prepared_as_transformers_does(tmp_path):
    """The dense reference is transformers' own processor, on a colour picture."""
    from transformers import ViTImageProcessor
    theirs = ViTImageProcessor(size={"height": 16, "width": 20}, image_mean=[0.4, 0.5, 0.6],
                               image_std=[0.2, 0.3, 0.4])
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (33, 47, 3), dtype=np.uint8))
    ours = processor_of(str(tmp_path))(image)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == expected.shape == (3, 16, 20)
    assert (ours - expected).abs().max() < 0.02  # one grey level of 255, over the smallest std


def test_a_picture_processor_survives_its_own_file(tmp_path):
    for p in (Picture(16, 16, (0.5,), (0.25,)), Picture(28, 28, (0.5,) * 3, (0.2,) * 3, 3,
                                                        crop=0.875)):
        p.save_pretrained(tmp_path)
        back = processor_of(str(tmp_path))
        assert (back.height, back.width, back.mean, back.std) == (p.height, p.width, p.mean, p.std)
        assert (back.crop is None) == (p.crop is None)
        if p.crop:
            assert back.crop == pytest.approx(p.crop, abs=1e-9)


def test_digits_through_the_shipped_model(glyph_vit):
    task = task_for(read("digits"), glyph_vit)
    model = task.load(glyph_vit)
    batch = task.example(4)
    assert batch["pixel_values"].shape == (4, 1, 16, 16)
    assert model.config.id2label[7] == "7"
    out = model(**batch)
    assert out.logits.shape == (4, 10) and out.loss.isfinite()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="lacks config.json"):
        task_for(read("digits"), Tiny(), processor=Picture(8, 8, (0.5,), (0.5,))).load(
            str(tmp_path))


def test_a_model_that_is_not_there_is_named_with_its_neighbours(glyph_vit):
    with pytest.raises(ConfigError, match="there is no model at .* did you mean 'glyph-vit'"):
        task_for(read("digits"), glyph_vit.replace("glyph-vit", "glyphvit"))
    with pytest.raises(ConfigError, match="there is no such folder here"):
        task_for(read("digits"), "nobody/nothing")


# -- heads -----------------------------------------------------------------------------------------
class Tiny(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, classes)


def test_a_head_gets_the_width_of_the_data_and_the_rest_stays():
    model = Tiny()
    body = model.body.weight.clone()
    resize_head(model, ("a", "b", "c"))
    assert model.head.weight.shape == (3, 6) and torch.equal(model.body.weight, body)


def test_a_head_of_the_right_width_is_kept():
    model = Tiny(3)
    model.num_classes = 3
    before = model.head.weight
    assert resize_head(model, ("a", "b", "c")).head.weight is before


def test_a_transformers_head_takes_names(glyph_vit):
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(glyph_vit)
    resize_head(model, ("x", "y"))
    assert model.classifier.out_features == 2 and model.num_labels == 2
    assert model.config.id2label == {0: "x", 1: "y"}
    assert model(pixel_values=torch.zeros(1, 1, 16, 16),
                 labels=torch.tensor([1])).loss.isfinite()


def test_a_model_without_linear_layers_has_no_head_to_tell():
    with pytest.raises(ConfigError, match="cannot tell the head"):
        resize_head(nn.Sequential(nn.Conv2d(1, 1, 1)), ("a", "b"))


# -- text ------------------------------------------------------------------------------------------
def test_sentences_are_padded_to_the_longest_and_masked(tmp_path, tokenizer):
    data = read(lines(tmp_path / "x.jsonl", [{"text": "abc", "label": 0},
                                             {"text": "a", "label": 1}]), validation=0)
    task = task_for(data, "", processor=tokenizer)
    rows = task.rows("train")
    batch = task.collate([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 3) and batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"][1, 1:].tolist() == [tokenizer.pad_token_id] * 2


def test_the_example_is_the_costliest_batch(tmp_path, tokenizer):
    data = read(lines(tmp_path / "x.jsonl", [{"text": "a" * n, "label": n % 3}
                                             for n in (3, 9, 1, 7)]), validation=0)
    task = task_for(data, "", processor=tokenizer)
    assert task.example(2)["attention_mask"].sum(1).tolist() == [9, 7]


def test_documents_are_joined_by_stops_and_nothing_is_lost(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcde")
    (tmp_path / "b.txt").write_text("fg")
    task = task_for(read(tmp_path, validation=0), "", processor=tokenizer, max_length=4)
    rows = task.rows("train")
    ids = torch.cat([rows[i]["input_ids"] for i in range(len(rows))])
    assert tokenizer.decode(ids.tolist()) == "abcde</s>fg"  # the last lone token has no next
    assert [rows.length(i) for i in range(len(rows))] == [4, 4]


def test_answers_beyond_the_length_are_left_out_and_said(tmp_path, tokenizer):
    rows = [{"prompt": "p" * 30, "completion": "no"}, {"prompt": "p", "completion": "yes"}]
    data = read(lines(tmp_path / "x.jsonl", rows), validation=0)
    task = task_for(data, "", processor=tokenizer, max_length=8)
    assert len(task.rows("train")) == 1
    assert "1 of 2 rows" in task.notes[0]
    with pytest.raises(DataError, match="no row has an answer"):
        task_for(data, "", processor=tokenizer, max_length=2).rows("train")


def test_padding_is_not_learnt(tmp_path, tokenizer):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "d"}]
    task = task_for(read(lines(tmp_path / "x.jsonl", rows), validation=0), "",
                    processor=tokenizer)
    made = task.rows("train")
    batch = task.collate([made[0], made[1]])
    assert batch["labels"][1, -1] == -100 and batch["attention_mask"][1, -1] == 0


# -- figures ---------------------------------------------------------------------------------------
def test_figures_of_classification_are_scikit_learns():
    g = torch.Generator().manual_seed(0)
    answers, labels = torch.randint(4, (200,), generator=g), torch.randint(4, (200,), generator=g)
    got = classification(answers, labels, 5)  # class 4 never occurs
    assert got["accuracy"] == pytest.approx((answers == labels).double().mean().item())
    assert got["f1"] == pytest.approx(f1_score(labels, answers, labels=[0, 1, 2, 3],
                                               average="macro"))


def test_token_accuracy_compares_each_answer_with_the_next_token(tmp_path, tokenizer):
    rows = [{"prompt": "ab", "completion": "cd"}]
    task = task_for(read(lines(tmp_path / "x.jsonl", rows), validation=0), "",
                    processor=tokenizer)
    row = task.rows("train")[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    perfect = nn.functional.one_hot(ids.roll(-1, 1), len(tokenizer)).float()
    assert task.measure(task.reduce(perfect, labels), labels)["token_accuracy"] == 1.0
    copies = nn.functional.one_hot(ids, len(tokenizer)).float()
    assert task.measure(task.reduce(copies, labels), labels)["token_accuracy"] == 0.0


def test_a_class_is_read_at_the_end_of_a_text_and_each_text_has_one(tmp_path):
    """T5's head refuses other rows in the middle of a step; here they are named before."""
    from burnish.testing.tasks import posed

    base, _, _ = posed("sequence-to-sequence", tmp_path, 2)
    from transformers import AutoTokenizer

    data = tmp_path / "rows.jsonl"

    def fitted(*texts):
        data.write_text("".join(json.dumps({"text": t, "label": "ab"[i % 2]}) + "\n"
                                for i, t in enumerate(texts)))
        return burnish.fit(str(base), str(data), "lora(rank=2)", output=tmp_path / "out",
                           max_steps=1, batch_size=2, validation=0, quiet=True, overwrite=True)

    with pytest.raises(ConfigError, match=r"train, row 0 has no token 2 \(eos_token_id\)"):
        fitted("a red disc", "a blue box")
    end = AutoTokenizer.from_pretrained(base).eos_token
    with pytest.raises(DataError, match="row 1 has 2 of them and the first 1; leave '.*' out"):
        fitted(f"a red disc {end}", f"a {end} blue box {end}")
    assert fitted(f"a red disc {end}", f"a blue box {end}").facts["data"]["task"] == \
        "text-classification"


def test_a_misspelt_choice_is_answered_with_the_nearest(tmp_path):
    def refused(words, **how):
        with pytest.raises(ConfigError, match=words) as error:
            burnish.fit(str(GLYPH_VIT), "digits", "lora(rank=2)", output=tmp_path / "out",
                        quiet=True, **how)
        assert len(str(error.value)) < 620

    refused("^lr_scheduler_type: there is no 'cosin'; did you mean 'cosine'",
            lr_scheduler_type="cosin")
    refused("^lr_scheduler_type: there is no 'xyzzy'; expected one of linear, cosine, ",
            lr_scheduler_type="xyzzy")
    refused("^there is no task 'classify'; did you mean 'text-classification'", task="classify")
    refused("expected image-, text-, audio-, cloud- or graph- and behind it classification, "
            "multi-label or regression; or image-embedding, .* or sequence-to-sequence$",
            task="xyzzy")
