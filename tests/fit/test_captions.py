"""What is on a picture: rows, what a decoder writes, the figures of that."""

from __future__ import annotations

import json

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError
from burnish.fit.captioned import Captioned
from burnish.fit.data import read
from burnish.fit.places import suited
from burnish.fit.tasks import evaluate, task_for
from burnish.fit.tasks.captions import rouge_l
from burnish.testing.captions import BLIP, CLIP, GIT, WRITES, captioned, made, words

ONE = (BLIP, GIT)                        # a text and its prompt as one
KINDS = (WRITES, *ONE)


def learnt(folder, model=None, processor=None, kind=WRITES, **how):
    own, reads, said = made(kind)
    data = read(captioned(folder, 1), task="image-captioning", validation=0)
    task = task_for(data, "", processor=processor or Captioned(reads, said), **how)
    task.settle(model or own)
    return task, model or own


def test_the_model_says_how_pictures_with_texts_are_learnt(tmp_path):
    data = read(captioned(tmp_path / "a", 1), validation=0)
    assert suited(data, made(CLIP)[0]).task == "image-text-contrastive"
    for kind in KINDS:
        assert suited(data, made(kind)[0]).task == "image-captioning"


def test_a_text_is_learnt_with_its_end_and_the_loss_is_the_models(tmp_path):
    task, model = learnt(tmp_path / "a")
    rows = task.rows("train")
    batch = task.collate([rows[0]])
    ids = words()("a red disc", add_special_tokens=False)["input_ids"]
    assert batch["decoder_input_ids"].tolist() == [[1, *ids]]
    assert batch["labels"].tolist() == [[*ids, 2]]
    model.eval()
    with torch.no_grad():
        batch = task.collate([rows[i] for i in range(9)])
        theirs = model(pixel_values=batch["pixel_values"], labels=batch["labels"])
        assert task.loss(theirs, batch["labels"]).item() == pytest.approx(theirs.loss.item(),
                                                                          abs=1e-6)
        assert evaluate(model, task, "train", 4)["loss"] == pytest.approx(theirs.loss.item(),
                                                                          abs=1e-6)


@pytest.mark.parametrize("kind", ONE)
def test_a_text_behind_its_prompt_is_learnt_with_its_end(tmp_path, kind):
    """As the model's own loss has it, however rows are batched."""
    task, model = learnt(tmp_path / "a", kind=kind)
    rows = task.rows("train")
    batch = task.collate([rows[0]])
    ids = words()("a red disc", add_special_tokens=False)["input_ids"]
    assert batch["input_ids"].tolist() == [[1, *ids, 2]]
    assert batch["labels"].tolist() == [[-100, *ids, 2]]
    model.eval()
    with torch.no_grad():
        batch = task.collate([rows[i] for i in range(9)])
        theirs = model(**batch)
        for loss in (task.loss(theirs, batch["labels"]).item(),
                     evaluate(model, task, "train", 4)["loss"]):
            assert loss == pytest.approx(theirs.loss.item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_whole_forwards_write(tmp_path, kind):
    """With states kept between tokens, picture by picture the same."""
    task, model = learnt(tmp_path / "a", max_answer=5, kind=kind)
    ids_of = "input_ids" if kind in ONE else "decoder_input_ids"
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
        model.eval()
        rows = task.rows("train")
        batch = task.collate([rows[i] for i in range(9)])
        ours = task.looked(model, batch, model(**task.feed(batch)))[0]
        for x, said in zip(batch["pixel_values"], ours, strict=True):
            ids = torch.tensor([[1]])
            while len(ids[0]) < 6 and ids[0, -1] != 2:
                out = model(pixel_values=x[None], **{ids_of: ids}).logits
                ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
            told = [i for i in ids[0, 1:].tolist() if i != 2]
            assert said.tolist() == told + [-100] * (5 - len(told))


def test_a_picture_is_looked_at_once(tmp_path):
    """BLIP's forward would look again for each token; afterwards it does."""
    task, model = learnt(tmp_path / "a", max_answer=5, kind=BLIP)
    seen = []
    model.vision_model.encoder.register_forward_hook(lambda *_: seen.append(1))
    x = task.collate([task.rows("train")[0]])
    with torch.no_grad():
        model.eval()
        task.write(model, {"pixel_values": x["pixel_values"]}, 5)
        assert len(seen) == 1 and "forward" not in vars(model.vision_model)
        model(**task.feed(x))
        model(**task.feed(x))
    assert len(seen) == 3


def test_rouge_l_counts_words_in_order():
    assert rouge_l("a red disc", "A red disc") == 1
    assert rouge_l("disc red a", "a red disc") == pytest.approx(1 / 3)
    assert rouge_l("a big red disc on top", "a red disc") == pytest.approx(2 * 3 / 9)
    assert (rouge_l("", "a"), rouge_l("", "")) == (0, 1)


def test_what_does_not_belong_together_is_refused(tmp_path):
    from burnish.fit.pictures import Picture

    def refused(name, text, **how):
        with pytest.raises(ConfigError, match=text):
            learnt(tmp_path / name, **how)

    small = Picture(16, 16, (0.5,) * 3, (0.5,) * 3)
    refused("a", "reads pictures of 24 x 24, .* makes them 16 x 16",
            processor=Captioned(small, words()))
    refused("b", "max_answer= says how much is written", max_length=9)
    refused("c", "has no decoder beside an encoder", model=made(CLIP)[0])
    mute = made(WRITES)[0]
    mute.config.decoder_start_token_id = None
    mute.generation_config.decoder_start_token_id = None
    refused("d", "what its decoder begins with", model=mute)
    for part in made(CLIP):
        part.save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match="is clip, no encoder of pictures with a decoder of text, "
                                          "BLIP or GIT"):
        burnish.fit(str(tmp_path / "clip"), str(tmp_path / "a"), task="image-captioning",
                    output=tmp_path / "out", quiet=True)


# -- a whole run -----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_learnt_within_the_promise(tmp_path, capsys, kind):
    for part in made(kind):
        part.save_pretrained(tmp_path / "model")
    data = captioned(tmp_path / "photos", 20)
    run = burnish.fit(str(tmp_path / "model"), str(data), "full", output=tmp_path / "out", lr=2e-3,
                      epochs=12, batch_size=18, quiet=True)
    assert run.metrics["validation"]["rouge_l"] > 0.75
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], abs=1e-6)
    assert main(["predict", str(run.folder), str(data / "0.png"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["answers"][0]["text"]
    assert len(said.split()) == 3 and said.startswith("a ")
    assert main(["merge", str(run.folder), "--output", str(tmp_path / "merged")]) == 0
    from transformers import AutoModelForImageTextToText

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(made(kind)[0])
