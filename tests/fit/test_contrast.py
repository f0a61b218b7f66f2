"""Pictures with texts: layouts, the loss from its equation, recall both ways, answers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError, DataError
from burnish.fit.captioned import Captioned
from burnish.fit.data import read
from burnish.fit.tasks import evaluate, task_for
from burnish.fit.tasks.contrast import contrast, ranks
from burnish.testing.captions import CLIP, SIGLIP, captioned, made, words


def learnt(folder, kind=CLIP, each=2, model=None, **how):
    own, reads, said = made(kind)
    data = read(captioned(folder, each), validation=0)
    task = task_for(data, "", processor=how.pop("processor", Captioned(reads, said)), **how)
    task.settle(model or own)
    return task, model or own


# -- layouts ---------------------------------------------------------------------------------------
def test_a_text_beside_a_picture_is_learnt(tmp_path):
    data = read(captioned(tmp_path / "a", 1), validation=0)
    assert (data.task, data.layout) == ("image-text-contrastive", "pictures with metadata")
    text = (tmp_path / "a" / "metadata.csv").read_text()
    for name in ("caption", "description"):
        (tmp_path / "a" / "metadata.csv").write_text(text.replace("file_name,text",
                                                                  f"file_name,{name}"))
        assert read(tmp_path / "a", validation=0).columns == f"text from {name!r}"
    (tmp_path / "a" / "metadata.csv").write_text(text.replace("file_name,text", "file_name,label"))
    assert read(tmp_path / "a", validation=0).task == "image-classification"


def test_a_text_of_the_same_name_is_a_pictures_own(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"the {name}\n")
    data = read(tmp_path, validation=0)
    assert data.task == "image-text-contrastive" and data.train["text"][:] == ["the a", "the b"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match="b.png has no b.txt beside it"):
        read(tmp_path)


# -- the loss --------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_loss_is_its_equation_and_equal_texts_are_no_strangers(sigmoid):
    s = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = ["a", "b", "a", "c", "b"]
    same = torch.tensor([[x == y for y in names] for x in names])
    wanted = []
    for i in range(5):
        apart = [j for j in range(5) if j == i or names[j] != names[i]]
        if sigmoid:
            wanted.append(sum(math.log1p(math.exp(-(1 if j == i else -1) * s[i, j].item()))
                              for j in apart))
        else:
            there, back = (sum(math.exp(x) for x in v) for v in (
                [s[i, j].item() for j in apart], [s[j, i].item() for j in apart]))
            wanted.append((math.log(there) + math.log(back)) / 2 - s[i, i].item())
    assert contrast(s, same, sigmoid).tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", [CLIP, SIGLIP])
def test_the_loss_of_unlike_texts_is_the_models_own(tmp_path, kind):
    task, model = learnt(tmp_path / "a", kind, each=1)
    model.eval()
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(9)])
    theirs = model(**task.feed(batch), return_loss=True).loss
    ours = task.loss(model(**task.feed(batch)), (batch["texts"],))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ("attention_mask" in batch) == (kind == CLIP)
    if kind == SIGLIP:                                     # filled up, as it was trained
        assert batch["input_ids"].shape[1] == 8


# -- the figures -----------------------------------------------------------------------------------
def test_ranks_count_wrong_ones_that_are_as_near():
    asked, among = torch.eye(3), torch.tensor([[1., 0, 0], [1, 0, 0], [0, .5, 0], [0, .9, 0],
                                               [0, 0, .1]])
    whose = torch.tensor([0, 1, 1, 2, 2])
    assert ranks(asked, among, torch.arange(3), whose).tolist() == [2, 2, 1]


def test_recall_is_that_of_answers(tmp_path):
    task, model = learnt(tmp_path / "a", each=3)
    model.eval()
    with torch.no_grad():
        found = evaluate(model, task, "train", 7)
        texts = sorted(set(task.data.train["text"][:]))
        hits = {1: 0, 5: 0}
        for row in task.data.train:
            said = task.answer(model, {"image": row["image"], "among": {t: t for t in texts}}, 0)
            for k in hits:
                hits[k] += row["text"] in list(said["nearest"])[:k]
        images = {str(i): (lambda i=i: task.data.train[i]["image"]) for i in range(27)}
        right = 0
        for text in texts:
            said = task.answer(model, {"text": text, "among": images}, 0)
            right += task.data.train[int(next(iter(said["nearest"])))]["text"] == text
    assert found["text_recall_at_1"] == pytest.approx(hits[1] / 27)
    assert found["text_recall_at_5"] == pytest.approx(hits[5] / 27)
    assert found["image_recall_at_1"] == pytest.approx(right / 9)
    assert found["recall_at_1"] == pytest.approx((hits[1] / 27 + right / 9) / 2)


# -- refusals --------------------------------------------------------------------------------------
def test_what_does_not_belong_together_is_refused(tmp_path):
    from burnish.fit.pictures import Picture

    def refused(name, text, **how):
        with pytest.raises(ConfigError, match=text):
            learnt(tmp_path / name, **how)

    small = Picture(16, 16, (0.5,) * 3, (0.5,) * 3)
    refused("a", "reads pictures of 24 x 24, and its processor makes them 16 x 16",
            processor=Captioned(small, words()))
    refused("b", "max_length=9 is more than the 8 positions", max_length=9)
    refused("c", "filled up to 8 tokens", kind=SIGLIP, max_length=5)
    refused("d", "and Picture does not read both", processor=small)
    more = words()
    more.add_tokens(["more"])
    refused("e", "the tokenizer writes 12 tokens and CLIPModel knows 11",
            processor=Captioned(made(CLIP)[1], more))
    from burnish.testing.sounds import WHISPER
    from burnish.testing.sounds import made as heard

    refused("f", "is no pair of towers", model=heard(WHISPER)[0])
    vit = tmp_path / "vit"
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                        intermediate_size=16, image_size=24, patch_size=6)
                              ).save_pretrained(vit)
    how = {"output": tmp_path / "out", "quiet": True}
    with pytest.raises(ConfigError, match="is vit, no pair of towers such as CLIP or SigLIP"):
        burnish.fit(str(vit), str(tmp_path / "a"), "lora(rank=2)", **how)
    with pytest.raises(ConfigError, match="dp looks at each sample by itself"):
        burnish.fit(made(CLIP)[0], str(tmp_path / "a"), "lora(rank=2) + dp(epsilon=8)", **how)


# -- a whole run -----------------------------------------------------------------------------------
def test_a_split_of_one_text_tells_nothing(tmp_path):
    """Its loss would be nought and its recall one, whatever the model says."""
    folder = captioned(tmp_path / "a", 2)
    reads = Captioned(*made(CLIP)[1:])
    for split, said in (("validation", "validation: all 2 rows have one text.*validation="),
                        ("train", "train: all 2 rows have one text, and nothing is told apart")):
        data = read(folder, validation=0)
        same = data.train.select([i for i, t in enumerate(data.train["text"]) if t == "a red disc"])
        data.splits[split] = same
        with pytest.raises(DataError, match=said):
            task_for(data, "", processor=reads)
    task = learnt(tmp_path / "b")[0]
    task.data.splits["test"] = task.data.train.select([0])
    with pytest.raises(DataError, match="test: it has one row, and nothing is told apart"):
        task.rows("test")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CLIP, SIGLIP])
def test_pairs_are_learnt_within_the_promise(tmp_path, kind, capsys):
    for part in made(kind):
        part.save_pretrained(tmp_path / "model")
    data = captioned(tmp_path / "photos", 12)
    run = burnish.fit(str(tmp_path / "model"), str(data), "full", output=tmp_path / "out", lr=2e-3,
                      epochs=8, batch_size=18, quiet=True)
    assert run.metrics["validation"]["text_recall_at_1"] > 0.4
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], abs=1e-5)
    asked = [str(data / "0.png"), "a red disc", "a blue cross"]
    assert main(["predict", str(run.folder), *asked, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [a["input"] for a in answers] == asked
    assert set(answers[0]["nearest"]) == set(asked[1:]) and set(answers[1]["nearest"]) == {asked[0]}
    assert main(["predict", str(run.folder), "a red disc"]) == 2
    assert "give some of both" in capsys.readouterr().err
