"""Objects in boxes: layouts, pairing, the loss, average precision, a whole run."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch

import burnish
from burnish.cli import main
from burnish.core.errors import ConfigError, DataError
from burnish.fit.boxes import assigned, average_precision, corners, overlap
from burnish.fit.data import read
from burnish.fit.tasks import evaluate, task_for
from burnish.testing.boxes import DETRS, detr, made, shapes


def learnt(folder, each=6, model=None, by=made, **how):
    own, reads = by()
    data = read(shapes(folder, each), validation=0)
    task = task_for(data, "", processor=reads, **how)
    task.settle(model or own)
    return task, model or own


# -- layouts ---------------------------------------------------------------------------------------
def test_both_forms_say_the_same(tmp_path):
    a = read(shapes(tmp_path / "a", 6), validation=0)
    b = read(shapes(tmp_path / "b", 6, form="rows"), validation=0)
    assert a.task == b.task == "object-detection" and "COCO" in a.layout
    assert (a.labels, b.labels) == (("disc", "box"), ("box", "disc"))      # COCO's own order
    for x, y in zip(a.train, b.train, strict=True):
        assert x["boxes"] == y["boxes"]
        assert [a.labels[k] for k in x["classes"]] == [b.labels[k] for k in y["classes"]]
    (tmp_path / "split").mkdir()
    (tmp_path / "a").rename(tmp_path / "split" / "train")
    shapes(tmp_path / "split" / "valid", 3, seed=1)
    both = read(tmp_path / "split")
    assert {k: len(v) for k, v in both.splits.items()} == {"train": 6, "validation": 3}


def test_crowds_are_left_out_and_what_is_wrong_is_named(tmp_path):
    folder = shapes(tmp_path / "a", 3)
    file = folder / "annotations.json"
    told = json.loads(file.read_text())

    def changed(**how):
        new = json.loads(json.dumps(told))
        new["annotations"][0] |= how
        file.write_text(json.dumps(new))
        return read(folder, validation=0)

    count = sum(map(len, read(folder, validation=0).train["classes"]))
    assert sum(map(len, changed(iscrowd=1).train["classes"])) == count - 1
    for how, words in (({"image_id": 99}, r"annotations\[0\]: there is no image 99"),
                       ({"category_id": 3}, "there is no category 3"),
                       ({"bbox": [1, 2, 0, 4]}, "0.png, field 'objects': a box is .*above 0"),
                       ({"bbox": [1, 2, 3]}, "expected x, y, width and height")):
        with pytest.raises(DataError, match=words):
            changed(**how)
    data = changed(bbox=[90, 90, 5, 5])
    task = task_for(data, "", processor=made()[1])
    task.settle(made()[0])
    with pytest.raises(DataError, match="a box lies outside of the picture, which is 40 x 40"):
        task.rows("train")[0]
    (folder / "images" / "0.png").unlink()
    with pytest.raises(DataError, match=r"images\[0\]: there is no picture"):
        read(folder)


@pytest.mark.parametrize("inside", ["train2017", "images/train2017", "images"])
def test_cocos_own_folders_are_read(tmp_path, inside):
    """Each split's pictures lie in a folder of its own, or all in one."""
    plain = read(shapes(tmp_path / "plain", 6), validation=0)
    root, told = tmp_path / "coco", {}
    for split, seed in (("train2017", 0), ("val2017", 1)):
        made_of = shapes(tmp_path / split, 6, seed=seed)
        pictures = root / inside.replace("train2017", split)
        pictures.mkdir(parents=True, exist_ok=True)
        told[split] = json.loads((made_of / "annotations.json").read_text())
        for image in told[split]["images"]:
            name = f"{split}-{image['file_name']}"
            (made_of / "images" / image["file_name"]).rename(pictures / name)
            image["file_name"] = name
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(told[split]))
        (root / f"annotations/captions_{split}.json").write_text("{}")
    data = read(root)
    assert data.task == "object-detection" and data.labels == ("disc", "box")
    assert set(data.splits) == {"train", "validation"}
    assert data.train["boxes"] == plain.train["boxes"] != data.validation["boxes"]
    (root / "annotations/instances_train.json").write_text("{}")
    with pytest.raises(DataError, match="instances_train.json is of train as well"):
        read(root)
    (root / "annotations/instances_train.json").rename(root / "annotations/instances_some.json")
    with pytest.raises(DataError, match="'some' is no split: expected train, val or test"):
        read(root)
    for name in ("some", "train2017"):
        (root / f"annotations/instances_{name}.json").unlink()
    assert set(read(root, validation=0).splits) == {"train"}            # the only one there is
    (root / "annotations/instances_test.json").write_text(json.dumps(told["val2017"]))
    with pytest.raises(DataError, match="no instances of train; it has instances_test.json"):
        read(root)
    for file in (root / "annotations").glob("instances_*"):
        file.unlink()
    (root / "annotations/instances_val2017.json").write_text("{}")
    with pytest.raises(DataError, match="expected images, annotations and categories"):
        read(root)


def test_a_file_that_is_told_badly_is_named_where_it_is(tmp_path):
    folder = shapes(tmp_path / "a", 4)
    file = folder / "annotations.json"
    plain = file.read_text()

    def wrong(part, at, how, words):
        told = json.loads(plain)
        told[part][at] |= how
        file.write_text(json.dumps(told))
        with pytest.raises(DataError, match=words) as error:
            read(folder, validation=0)
        assert "cannot be read" not in str(error.value)         # no library's own words

    for part, at, how, words in (
            ("images", 1, {"id": 0}, r"images\[1\] has the id of images\[0\], 0"),
            ("categories", 1, {"id": 1}, r"categories\[1\] has the id of categories\[0\], 1"),
            ("images", 1, {"id": [1]}, r"images\[1\], id: expected a number"),
            ("categories", 0, {"id": None}, r"categories\[0\], id: .* missing"),
            ("categories", 0, {"name": None}, r"categories\[0\], name: .* missing"),
            ("images", 0, {"file_name": None}, r"images\[0\], file_name: .* missing"),
            ("annotations", 0, {"image_id": {}}, r"annotations\[0\]: there is no image"),
            ("annotations", 0, {"category_id": [1]}, r"annotations\[0\]: there is no category"),
            ("annotations", 0, {"bbox": [1, 1, True, 4]}, "expected x, y, width and height")):
        wrong(part, at, how, words)
    told = json.loads(plain)
    file.write_text(json.dumps(told | {"annotations": []}))
    with pytest.raises(DataError, match="no picture has an object"):
        read(folder, validation=0)
    for image in told["images"]:                    # named from the folder that the file stands in
        image["file_name"] = f"images/{image['file_name']}"
    file.write_text(json.dumps(told))
    assert len(read(folder, validation=0).train) == 4
    rows = shapes(tmp_path / "b", 2, form="rows") / "metadata.jsonl"
    first, second = map(json.loads, rows.read_text().splitlines())
    first["objects"]["categories"] = [None] * len(first["objects"]["bbox"])
    rows.write_text(f"{json.dumps(first)}\n{json.dumps(second)}")
    with pytest.raises(DataError, match="line 1, field 'objects', category: .* missing"):
        read(tmp_path / "b", validation=0)


# -- pairing, loss ---------------------------------------------------------------------------------
def test_every_object_has_a_query_and_no_pairing_costs_less():
    g = torch.Generator().manual_seed(0)
    cost, counts = torch.randn(5, 4, 3, generator=g), torch.tensor([3, 0, 1, 2, 3])
    found = assigned(cost, counts)
    for c, n, which in zip(cost, counts.tolist(), found.tolist(), strict=True):
        assert which[n:] == [4] * (3 - n) and len(set(which[:n])) == n
        least = min(sum(c[q, k].item() for k, q in enumerate(p))
                    for p in itertools.permutations(range(4), n))
        assert sum(c[q, k].item() for k, q in enumerate(which[:n])) == pytest.approx(least)


def test_overlaps_by_hand():
    a = torch.tensor([0.0, 0, 2, 2])
    iou, wide = overlap(a, torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [3, 0, 4, 2]]))
    assert iou.tolist() == pytest.approx([1, 1 / 3, 0])
    assert wide.tolist() == pytest.approx([1, 1 / 3, -2 / 8])
    assert corners(torch.tensor([2.0, 3, 2, 4])).tolist() == [1, 1, 3, 5]


@pytest.mark.parametrize("by", [made, *(partial(detr, kind) for kind in DETRS)],
                         ids=["Yolos", *DETRS])
def test_the_loss_is_transformers_own(tmp_path, by):
    task, model = learnt(tmp_path / "a", by=by)
    model.eval()
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(6)])
    labels = [{"class_labels": rows[i]["labels"], "boxes": rows[i]["boxes"]} for i in range(6)]
    with torch.no_grad():
        theirs = model(pixel_values=batch["pixel_values"], labels=labels)
        ours = task.loss(theirs, (batch["labels"], batch["boxes"]))
        assert ours.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        for size in (1, 4):                                # however rows are batched
            assert evaluate(model, task, "train", size)["loss"] == pytest.approx(ours.item(),
                                                                                 rel=1e-5)


# -- average precision -----------------------------------------------------------------------------
def test_average_precision_by_hand():
    true = [torch.tensor([[0.0, 0, 4, 4, 0], [10, 0, 14, 4, 0]]), torch.zeros(0, 5)]
    said = [torch.tensor([[0.0, 0, 4, 4, 0.9, 0], [0, 0, 4, 4, 0.8, 0], [10, 0, 14, 3, 0.3, 0]]),
            torch.tensor([[0.0, 0, 1, 1, 0.7, 0]])]
    found = average_precision(said, true, 2)
    # surest first: right, a second of the same, a stranger, right while 3 / 4 overlap is enough
    low = (51 * 1.0 + 50 * 2 / 4) / 101
    assert found[0.5] == pytest.approx(low) and found[0.7] == pytest.approx(low)
    assert found[0.9] == pytest.approx(51 / 101)
    assert average_precision(said, [t[:0] for t in true], 2)[0.5] == 0
    assert average_precision([t.clone() for t in (torch.tensor([[0.0, 0, 4, 4, 0.9, 1]]),) * 2],
                             true, 2)[0.5] == 0


# -- refusals --------------------------------------------------------------------------------------
def test_what_does_not_fit_is_refused(tmp_path):
    task, model = learnt(tmp_path / "a")
    with pytest.raises(ConfigError, match="has 5 classes and the data 2"):
        task.fit_head(made(num_labels=5)[0])
    with pytest.raises(DataError, match="2 objects, and the model tells 1 in a picture at most"):
        learnt(tmp_path / "b", model=made(num_detection_tokens=1)[0])[0].rows("train")
    from transformers import ResNetConfig, RTDetrConfig, ViTConfig

    back = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    for config, name in ((ViTConfig(), "vit"), (RTDetrConfig(backbone_config=back), "rt_detr")):
        config.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=f"is {name}, no model that tells boxes as YOLOS and "
                                              "DETR do"):
            burnish.fit(str(tmp_path / name), str(tmp_path / "a"), "lora(rank=2)", quiet=True,
                        output=tmp_path / "out")


def test_a_picture_is_as_large_as_the_model_the_processor_or_somebody_says(tmp_path):
    for by, how, side in ((made, {}, 32), (partial(detr, "Detr"), {}, 64),
                          (made, {"resolution": 48}, 48),
                          (partial(detr, "Detr"), {"resolution": 48}, 48)):
        task, _ = learnt(tmp_path / f"{side}{len(list(tmp_path.iterdir()))}", by=by, **how)
        assert task.example(2)["pixel_values"].shape == (2, 3, side, side)


def test_the_surest_class_of_each_query_is_told(tmp_path):
    """By a softmax without "no object", or each class by itself."""
    for by, right in ((made, [0.25, 1]), (partial(detr, "ConditionalDetr"), [0.8, 0])):
        task, _ = learnt(tmp_path / str(right[1]), by=by)
        scores = [0.125, 0.25, 0.625] if by is made else [0.8, 0.3]
        raw = torch.tensor(scores)
        raw = raw.log() if by is made else raw.logit()
        told = task.sorted(torch.cat([raw, torch.tensor([0.5, 0.5, 0.2, 0.4])]).view(1, 1, -1))
        assert told[0, 0].tolist() == pytest.approx([0.4, 0.3, 0.6, 0.7, *right])


# -- a whole run -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_objects_are_found_within_the_promise(tmp_path, capsys):
    for part in made():
        part.save_pretrained(tmp_path / "model")
    data = shapes(tmp_path / "yard", 130)
    run = burnish.fit(str(tmp_path / "model"), str(data), "full", output=tmp_path / "out", lr=1e-3,
                      epochs=16, batch_size=16, quiet=True)
    found_within(run, data, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DETRS)
def test_so_are_they_behind_convolutions(tmp_path, kind, capsys):
    for part in detr(kind):
        part.save_pretrained(tmp_path / "model")
    data = shapes(tmp_path / "yard", 130)
    run = burnish.fit(str(tmp_path / "model"), str(data), "full", output=tmp_path / "out", lr=2e-3,
                      epochs=12, batch_size=16, quiet=True)
    found_within(run, data, capsys)


def found_within(run, data, capsys):
    """It has learnt, as promised, and is asked again."""
    losses = [h["eval_loss"] for h in run.history if "eval_loss" in h]
    assert losses[-1] < 0.85 * losses[0] and run.metrics["validation"]["map_50"] > 0.05
    assert run.promise.peak_bytes == run.truth.peak_bytes
    moment = run.facts["memory"]["moments"]["evaluate"]
    assert moment["promised"] == moment["measured"]
    assert main(["evaluate", str(run.folder), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"] == pytest.approx(run.metrics["validation"], abs=1e-5)
    assert main(["predict", str(run.folder), str(data / "images" / "0.png"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answers"][0]
    for o in answer["objects"]:
        x, y, w, h = o["box"]
        assert o["label"] in ("disc", "box") and o["score"] >= 0.5
        assert 0 <= x <= x + w <= 40 and 0 <= y <= y + h <= 40
