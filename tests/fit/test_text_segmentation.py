"""Masks of what texts name: rows, loss and figures by hand, refusals, memory, runs on CLIPSeg."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.tasks import task_for
from burnish.testing.captions import CLIP, DRAWS, SIDE, made, named
from burnish.testing.scenes import segformer, shapes
from burnish.testing.tasks import kept

SIX = ("vpt", "coop", "cocoop", "maple", "shared_attention", "shared_separate")


def learnt(data, **how):
    model, *reads = made(DRAWS)
    task = task_for(data, model, processor=burnish.fit.captioned.Captioned(*reads), **how)
    task.settle(model)
    return task, model


# -- rows ----------------------------------------------------------------------------------------
def test_pictures_masks_and_texts_are_read_as_they_stand(tmp_path):
    data = read(str(named(tmp_path / "d", 4)), validation=0)
    assert data.task == "text-segmentation" and data.labels is None and len(data.train) == 8
    task, _ = learnt(data)
    batch = task.collate([task.rows("train")[i] for i in range(2)])
    mask = np.asarray(Image.open(tmp_path / "d" / "masks" / "0-0.png"))
    assert torch.equal(batch["labels"][0], torch.tensor(mask > 127).float())
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (2, 5), "attention_mask": (2, 5), "pixel_values": (2, 3, SIDE, SIDE),
        "labels": (2, SIDE, SIDE)}
    words = (tmp_path / "d" / "metadata.csv").read_text().splitlines()[1].split(",")[2]
    assert task.processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == words


def test_a_mask_follows_its_picture_to_the_nearest_pixel(tmp_path):
    """Of another size, and of 1 for what others have 255 for."""
    root = tmp_path / "d"
    root.mkdir()
    half = np.zeros((2 * SIDE, 3 * SIDE), np.uint8)
    half[:, : 3 * SIDE // 2] = 1
    Image.fromarray(half).save(root / "m.png")
    Image.new("RGB", (3 * SIDE, 2 * SIDE)).save(root / "a.png")
    (root / "metadata.csv").write_text("file_name,mask_file_name,text\na.png,m.png,a red box\n")
    task, _ = learnt(read(str(root), validation=0))
    labels = task.rows("train")[0]["labels"]
    assert (labels[:, : SIDE // 2] == 1).all() and (labels[:, SIDE // 2:] == 0).all()


def test_without_a_text_masks_are_of_classes_and_either_may_be_said(tmp_path):
    root = shapes(tmp_path / "s", 3)
    assert read(str(root)).task == "semantic-segmentation"
    with pytest.raises(DataError, match="reads a text that names what a mask is of.*with text="):
        read(str(root), task="text-segmentation")
    both = named(tmp_path / "d", 2)
    (both / "metadata.csv").write_text(
        (both / "metadata.csv").read_text().replace("text\n", "said\n", 1))
    assert read(str(both), text="said", validation=0).task == "text-segmentation"
    with pytest.raises(DataError, match="hold nothing but 0 and 255"):       # classes, they are not
        read(str(both), validation=0)


def of_classes(folder, classes=3):
    """A table of pictures, masks of whole numbers and a column of words beside them."""
    g = np.random.default_rng(0)
    folder.mkdir()
    lines = ["file_name,mask_file_name,text"]
    for i in range(8):
        for name, shape in ((f"{i}.png", (SIDE, SIDE, 3)), (f"{i}-mask.png", (SIDE, SIDE))):
            top = 255 if name == f"{i}.png" else classes
            Image.fromarray(g.integers(0, top, shape).astype(np.uint8)).save(folder / name)
        lines.append(f"{i}.png,{i}-mask.png,yard {i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_model_says_whether_masks_are_of_classes_or_of_what_a_text_names(tmp_path):
    data = of_classes(tmp_path / "d")
    kept(tmp_path / "classes", *segformer())
    kept(tmp_path / "named", *made(DRAWS))
    how = {"quiet": True, "max_steps": 1, "batch_size": 2}
    run = burnish.fit(str(tmp_path / "classes" / "base"), str(data), "lora(rank=2)",
                      output=tmp_path / "out", **how)
    assert run.facts["data"]["task"] == "semantic-segmentation"
    assert run.facts["data"]["labels"] == ["0", "1", "2"]
    assert main(["evaluate", str(run.folder), str(data)]) == 0
    for reading, words in (({"text": "text"}, "no model that draws the mask of what a text names"),
                           ({"task": "text-segmentation"}, "no model that draws the mask")):
        with pytest.raises(ConfigError, match=words):
            burnish.fit(str(tmp_path / "classes" / "base"), str(data), "lora(rank=2)",
                        output=tmp_path / "no", **how, **reading)
    with pytest.raises(DataError, match="its mask holds 1, 2 beside 0"):
        burnish.fit(str(tmp_path / "named" / "base"), str(data), "lora(rank=2)",
                    output=tmp_path / "no", **how)
    both = named(tmp_path / "b", 4)
    with pytest.raises(DataError, match="hold nothing but 0 and 255"):
        burnish.fit(str(tmp_path / "classes" / "base"), str(both), "lora(rank=2)",
                    output=tmp_path / "no", **how)


@pytest.mark.parametrize("broken, words", [
    (lambda m: Image.fromarray(np.arange(SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint8) % 3),
     "its mask holds 1, 2 beside 0, and one text names one thing"),
    (lambda m: Image.new("RGB", (SIDE, SIDE)), "its pixels are colours"),
    (lambda m: m.resize((SIDE, SIDE // 2)), "the mask is 24 x 12, and its picture 24 x 24")])
def test_a_mask_of_other_things_is_named_with_its_row(tmp_path, broken, words):
    root = named(tmp_path / "d", 2)
    path = root / "masks" / "1-0.png"
    broken(Image.open(path)).save(path)
    with pytest.raises(DataError, match=f"1.png.*{words}|line 4.*{words}"):
        task, _ = learnt(read(str(root), validation=0))
        [task.rows("train")[i] for i in range(4)]


def test_a_mask_cut_in_half_is_named(tmp_path):
    root = named(tmp_path / "d", 2)
    path = root / "masks" / "1-0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="line 4.*the mask cannot be read"):
        read(str(root), validation=0)


# -- loss and figures ----------------------------------------------------------------------------
def test_loss_and_figures_are_by_hand(tmp_path):
    task, model = learnt(read(str(named(tmp_path / "d", 3)), validation=0))
    model = model.double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in task.example(4).items()}
    out, y = model(**batch), batch["labels"]
    p = out.logits.sigmoid()
    each = -(y * p.log() + (1 - y) * (1 - p).log())
    assert torch.allclose(out.loss, each.mean()) and torch.allclose(
        task.loss(out.logits, y), each.mean())
    counts, losses = task.kept({"logits": out.logits}, y)
    assert torch.allclose(losses[:, 0].double(), each.flatten(1).sum(1), rtol=1e-5)
    said = p > 0.5
    want = [[int((said[b] & (y[b] == 1)).sum()), int(said[b].sum()), int(y[b].sum())]
            for b in range(4)]
    assert counts.tolist() == want
    found = task.measure(torch.tensor([[3, 4, 6], [0, 0, 0], [0, 2, 0]]), None)
    assert found["dice"] == pytest.approx((6 / 10 + 1 + 0) / 3)
    assert found["iou"] == pytest.approx(3 / (4 + 6 - 3 + 2))


# -- models --------------------------------------------------------------------------------------
def test_other_models_and_other_processors_are_refused(tmp_path):
    data = named(tmp_path / "d", 3)
    base = kept(tmp_path / "clip", *made(CLIP))
    with pytest.raises(ConfigError, match="is clip, no model that draws the mask of what a text "
                                          r"names \(CLIPSeg\).*fit can train it for"):
        burnish.fit(str(base), str(data), "full", output=tmp_path / "o", quiet=True)
    model, seen, tokens = made(DRAWS)
    base = kept(tmp_path / "seg", model, seen, tokens)
    config = json.loads((base / "preprocessor_config.json").read_text())
    for change, words in (({"do_center_crop": True, "crop_size": {"height": 12, "width": 12}},
                           "cuts the margins of a picture off"),
                          ({"size": {"height": 25, "width": 25}}, "squares of a multiple of 6")):
        (base / "preprocessor_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=words):
            burnish.fit(str(base), str(data), "full", output=tmp_path / "o", quiet=True)
    (base / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="max_length=99 is more than the 8 positions"):
        burnish.fit(str(base), str(data), "full", output=tmp_path / "o", quiet=True, max_length=99)
    with pytest.raises(ConfigError, match="is clipseg, .*fit can train it for.*text-segmentation"):
        burnish.fit(str(base), str(shapes(tmp_path / "s", 3)), "full", output=tmp_path / "o",
                    quiet=True)


@pytest.mark.parametrize("recipe", [
    *(f"tunevlseg(strategy={s!r}, layers=2, length=2)" for s in SIX), "lora(rank=2)", "full",
    "tunevlseg(strategy='maple', layers=1, length=2, decoder=True) + checkpoint",
    "nf4 + lora(rank=2)"])
def test_a_step_takes_what_was_promised(tmp_path, recipe):
    """Texts bring two placeholders behind their first token, as the rows of a text want them."""
    base = kept(tmp_path / "seg", *made(DRAWS))
    data = named(tmp_path / "d", 8, before="a a a")
    run = burnish.fit(str(base), str(data), recipe, output=tmp_path / "o", max_steps=2,
 batch_size=4, quiet=True, report=False)
    assert run.truth.peak_bytes == run.promise.peak_bytes > 0
    assert run.truth.by_category == run.promise.by_category


@pytest.mark.slow
def test_a_mask_is_learnt_asked_and_judged(tmp_path, capsys):
    base, data = kept(tmp_path / "seg", *made(DRAWS)), named(tmp_path / "d", 60)
    out = str(tmp_path / "o")
    assert main(["fit", "--model", str(base), "--data", str(data), "--recipe", "full", "--output",
                 out, "--epochs", "60", "--lr", "2e-3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"]["validation"]["dice"] > 0.5
    one = str(data / "pictures" / "3.png")
    assert main(["predict", out, one, "a red disc", "a blue box", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [a["labels"][1] for a in answers] == ["a red disc", "a blue box"]
    for a in answers:
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(a["mask"]))))
        assert mask.shape == (SIDE, SIDE) and set(np.unique(mask)) <= {0, 1}
        assert a["shares"] == pytest.approx({a["labels"][1]: mask.mean()})
    assert main(["predict", out, one]) == 2
    assert "give some of both" in capsys.readouterr().err
    assert main(["evaluate", out, str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(told["metrics"]["validation"], rel=1e-4)
    assert found["base"]["dice"] < found["tuned"]["dice"]


def test_prompts_of_clipseg_are_a_file_that_is_opened_again(tmp_path, capsys):
    base = kept(tmp_path / "seg", *made(DRAWS))
    data = named(tmp_path / "d", 20, before="a a a")
    run = burnish.fit(str(base), str(data), "tunevlseg(strategy='shared_separate', layers=2, "
                      "length=2, hidden=8)", output=tmp_path / "o", epochs=2, lr=1e-2, quiet=True)
    assert main(["evaluate", str(tmp_path / "o"), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], rel=1e-4)
