"""Pictures with a class for every pixel: layouts, preparation, figures."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from burnish.core.errors import ConfigError, DataError
from burnish.fit.data import read
from burnish.fit.masks import IGNORED
from burnish.fit.tasks import evaluate, task_for
from burnish.testing.scenes import segformer, shapes


def learnt(folder, reduce=False, processor=None, names=3, **how):
    made = processor if processor is not None else segformer(reduce=reduce)[1]
    return task_for(read(folder, validation=0), "", processor=made, **how)


# -- layouts ---------------------------------------------------------------------------------------
def test_folders_of_pictures_and_masks_are_read(tmp_path):
    data = read(shapes(tmp_path / "a", 6), validation=0)
    assert (data.task, data.layout, data.labels) == ("semantic-segmentation",
                                                     "pictures with masks", ("0", "1", "2"))
    assert data.held == (0, 1, 2, IGNORED)
    ade = read(shapes(tmp_path / "b", 4, splits=("training", "validation")))
    assert {k: len(v) for k, v in ade.splits.items()} == {"train": 4, "validation": 4}
    for split in ("train", "val"):
        shapes(tmp_path / "c" / split, 3)
    (tmp_path / "c" / "classes.txt").write_text("floor\ndisc\nbox\n")
    apart = read(tmp_path / "c")
    assert {k: len(v) for k, v in apart.splits.items()} == {"train": 3, "validation": 3}
    assert apart.labels == ("floor", "disc", "box")
    (tmp_path / "a" / "id2label.json").write_text(json.dumps({"0": "f", "1": "d", "2": "b"}))
    assert read(tmp_path / "a").labels == ("f", "d", "b")
    (tmp_path / "a" / "id2label.json").write_text(json.dumps({"1": "d", "2": "b"}))
    with pytest.raises(DataError, match="id2label.json: expected an object with a name for each"):
        read(tmp_path / "a")


def test_pictures_and_masks_stay_together(tmp_path):
    root = shapes(tmp_path / "a", 3)
    (root / "masks" / "1.png").rename(root / "masks" / "1_mask.png")
    data = read(root, validation=0)
    for i in range(3):
        mask = np.asarray(data.train[i]["mask"])
        red = np.asarray(data.train[i]["image"])[..., 0] > 150
        assert red[mask == 1].mean() > 0.7
    (root / "masks" / "1_mask.png").unlink()
    with pytest.raises(DataError, match="picture .*1.jpg has no mask: there is no 1.png"):
        read(root)


def test_pictures_of_one_name_in_several_folders_keep_their_masks(tmp_path):
    """Frames of videos are called alike: a mask is of the folder of its picture."""
    root = tmp_path / "a"
    for number, name in enumerate(("x", "y"), 1):
        for kind, mode, value in (("images", "RGB", (100 * number,) * 3), ("masks", "L", number)):
            (root / kind / name).mkdir(parents=True)
            Image.new(mode, (8, 8), value).save(root / kind / name / "0.png")
    (root / "classes.txt").write_text("zero\none\ntwo\n")
    data = read(root, validation=0)
    for row in data.train:
        assert np.asarray(row["image"])[0, 0, 0] == 100 * np.asarray(row["mask"])[0, 0]
    Image.new("L", (8, 8), 1).save(root / "masks" / "x" / "0_mask.png")
    with pytest.raises(DataError, match="0.png has 2 masks: .*; leave one of them"):
        read(root)
    for kind in ("x", "y"):                             # two of its name, and neither beside it
        (root / "masks" / kind).rename(root / "masks" / f"{kind}{kind}")
    with pytest.raises(DataError, match="has 3 masks"):
        read(root)


def test_names_are_read_beside_the_folders_and_each_once(tmp_path):
    root = shapes(tmp_path / "a", 3)
    (tmp_path / "classes.txt").write_text("of\nother\ndata\n")
    assert read(root).labels == ("0", "1", "2")
    (root / "classes.txt").write_text("floor\nbox\nbox\n")
    with pytest.raises(DataError, match="classes.txt names 'box' twice"):
        read(root)


def test_a_picture_that_breaks_off_is_named_where_it_is_read(tmp_path):
    root = shapes(tmp_path / "a", 3)
    whole = (root / "images" / "1.jpg").read_bytes()
    (root / "images" / "1.jpg").write_bytes(whole[:-40])
    rows = learnt(root).rows("train")
    with pytest.raises(DataError, match="1.jpg: the picture cannot be read: .*truncated"):
        [rows[i] for i in range(3)]


def test_a_picture_on_its_side_is_asked_about_upright(tmp_path):
    from types import SimpleNamespace

    from burnish.fit import asked

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    task = SimpleNamespace(takes=("image",), paired=False)
    ((_, row),) = asked.rows([str(tmp_path / "x.jpg")], task, {})
    assert row["image"].size == (20, 40)


def test_another_data_set_of_the_task_is_read_like_the_first(tmp_path):
    task = learnt(shapes(tmp_path / "a", 3))
    other = task.on(read(shapes(tmp_path / "b", 3, seed=1), validation=0), segformer()[0])
    assert other.rows("train")[0]["labels"].shape == (32, 32) and other.mixes is task.mixes


def test_metadata_and_tables_name_masks(tmp_path):
    import datasets

    root = shapes(tmp_path / "a", 4)
    (root / "metadata.csv").write_text("file_name,mask_file_name\n" + "".join(
        f"images/{i}.jpg,masks/{i}.png\n" for i in range(4)))
    (root / "masks").rename(root / "other")
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text().replace("masks/",
                                                                                  "other/"))
    assert read(root, validation=0).task == "semantic-segmentation"
    opened = {k: [Image.open(root / d / f"{i}.{s}") for i in range(4)]
              for k, d, s in (("image", "images", "jpg"), ("label", "other", "png"))}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    table = datasets.Dataset.from_dict(opened, features=kinds)
    assert read(table, validation=0).task == "semantic-segmentation"
    assert read(table.rename_column("label", "truth"), label="truth",
                validation=0).task == "semantic-segmentation"
    with pytest.raises(DataError, match="name them with image= and label="):
        read(table.rename_column("label", "truth"), task="semantic-segmentation")


def test_the_same_folders_are_classes_where_that_is_said(tmp_path):
    data = read(shapes(tmp_path / "a", 4), task="image-classification", validation=0)
    assert data.labels == ("images", "masks")


def changed(root, mask):
    Image.fromarray(mask).save(root / "masks" / "1.png")
    return root


@pytest.mark.parametrize("mask, said", [
    (np.zeros((40, 40, 3), np.uint8), "1.jpg, field 'mask': .*its pixels are colours .RGB."),
    (np.full((40, 40), 300, np.uint16), "1.jpg, field 'mask': .*it holds number 300, and image"),
    (np.zeros((40, 50), np.uint8), "1.jpg, field 'mask': the mask is 50 x 40, and its picture 40"),
])
def test_a_mask_that_is_none_is_named(tmp_path, mask, said):
    with pytest.raises(DataError, match=said):
        read(changed(shapes(tmp_path / "a", 3), mask))


@pytest.mark.parametrize("numbers, said", [
    ((0, 255), "nothing but 0 and 255, which is not counted: where it is the object, save it as 1"),
    ((0, 0), "nothing but 0, one class"),
    ((255, 255), "every pixel of every mask is 255"),
    ((0, 38, 75), r"3 numbers up to 75 \(0, 38, 75, ...\), which look like grey levels"),
])
def test_numbers_that_are_no_classes_are_refused(tmp_path, numbers, said):
    root = shapes(tmp_path / "a", 3)
    for i in range(3):
        mask = np.asarray(numbers, np.uint8)[np.arange(1600).reshape(40, 40) % len(numbers)]
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    with pytest.raises(DataError, match=said):
        read(root)


@pytest.mark.parametrize("folder, ending, whose", [
    ("annotations", "json", "COCO"), ("labels", "txt", "YOLO"), ("annotations", "xml", "Pascal")])
def test_boxes_of_other_forms_are_told_which_is_read(tmp_path, folder, ending, whose):
    (tmp_path / folder).mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.jpg")
    (tmp_path / folder / f"0.{ending}").write_text("{}")
    with pytest.raises(DataError, match=f"as {whose}.* them; objects in boxes are read from COCO"):
        read(tmp_path)


# -- as the model's own processor does -------------------------------------------------------------
@pytest.mark.parametrize("reduce", [False, True])
def test_a_row_is_what_the_processor_makes(tmp_path, reduce):
    root = shapes(tmp_path / "a", 3, first=int(reduce))
    task = learnt(root, reduce)
    own = segformer(reduce=reduce)[1]
    for i in range(3):
        row = task.rows("train")[i]
        want = own(images=Image.open(root / "images" / f"{i}.jpg"), return_tensors="pt",
                   segmentation_maps=Image.open(root / "masks" / f"{i}.png"))
        assert torch.equal(row["pixel_values"], want["pixel_values"][0])
        assert torch.equal(row["labels"], want["labels"][0])
        assert set(row["labels"].unique().tolist()) <= {0, 1, 2, IGNORED}


def test_a_processor_that_mixes_numbers_gets_the_nearest(tmp_path):
    """BEiT's resizes masks as it does pictures, which makes classes that no pixel has."""
    own = transformers.BeitImageProcessorPil(size={"height": 33, "width": 33}, do_center_crop=False)
    root = shapes(tmp_path / "a", 3)
    task = learnt(root, processor=own)
    image, mask = (Image.open(root / d) for d in ("images/0.jpg", "masks/0.png"))
    theirs = own(images=image, segmentation_maps=mask, return_tensors="pt")
    row = task.rows("train")[0]
    assert task.mixes and not learnt(root).mixes
    assert not set(theirs["labels"].unique().tolist()) <= {0, 1, 2, IGNORED}
    assert set(row["labels"].unique().tolist()) <= {0, 1, 2, IGNORED}
    assert torch.equal(row["pixel_values"], theirs["pixel_values"][0])


def test_names_are_of_the_classes_that_are_learnt(tmp_path):
    root = shapes(tmp_path / "a", 3, first=1)                     # 1, 2 and 3, and no 0
    assert learnt(root).names == ("0", "1", "2", "3")
    assert learnt(root, reduce=True).names == ("1", "2", "3")
    assert learnt(root, reduce_labels=True).names == ("1", "2", "3")
    (root / "classes.txt").write_text("floor\ndisc\nbox\n")
    assert learnt(root, reduce=True).names == ("floor", "disc", "box")
    with pytest.raises(DataError, match="hold number 3, and there are names of 3 classes; where "
                                        "number 0 is no class, reduce_labels=True"):
        learnt(root)
    (root / "classes.txt").write_text("background\nfloor\ndisc\nbox\n")
    assert len(learnt(root).names) == 4
    with pytest.raises(ConfigError, match="first class is called 'background'; leave it out"):
        learnt(root, reduce=True)
    with pytest.raises(ConfigError, match="ViTImageProcessorPil prepares no masks"):
        learnt(root, processor=transformers.ViTImageProcessorPil())


# -- loss and figures ------------------------------------------------------------------------------
def test_the_loss_is_the_models_own_and_pixels_weigh_alike(tmp_path):
    task = learnt(shapes(tmp_path / "a", 5))
    model = segformer()[0].eval()
    rows = task.rows("train")
    batch = task.collate([rows[i] for i in range(5)])
    with torch.no_grad():
        out = model(**batch)
        assert torch.allclose(task.loss(out, batch["labels"]), out.loss, atol=1e-6)
        figures = evaluate(model, task, "train", 2)
    assert figures["loss"] == pytest.approx(out.loss.item(), abs=1e-6)


def test_figures_are_scikit_learns(tmp_path):
    task = learnt(shapes(tmp_path / "a", 2))
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 9, 7, generator=g)
    logits[:, 2] = -9                                              # never said, and there
    labels = torch.randint(0, 3, (4, 9, 7), generator=g)
    labels[torch.rand(4, 9, 7, generator=g) < 0.2] = IGNORED
    counts, _ = task.kept({"logits": logits}, {"labels": labels})
    got = task.measure(counts, task.told(labels))
    asked = labels != IGNORED
    true, said = labels[asked], logits.argmax(1)[asked]
    assert got["mean_iou"] == pytest.approx(jaccard_score(true, said, average="macro"))
    assert got["mean_accuracy"] == pytest.approx(recall_score(true, said, average="macro"))
    assert got["overall_accuracy"] == pytest.approx(accuracy_score(true, said))
    assert task.told(labels).tolist() == asked.flatten(1).sum(1).tolist()


def test_a_model_and_its_data_agree(tmp_path):
    task = learnt(shapes(tmp_path / "a", 3))
    with pytest.raises(ConfigError, match="has 5 classes and the data 3"):
        task.fit_head(segformer(num_labels=5)[0])
    model = segformer(semantic_loss_ignore_index=0)[0]
    task.settle(model)
    assert model.config.semantic_loss_ignore_index == IGNORED
    assert "semantic_loss_ignore_index=0 is put to 255" in task.notes[-1]
    loose = segformer()[1]
    loose.do_resize = False
    task = learnt(tmp_path / "a", processor=loose)
    rows = [{"pixel_values": torch.zeros(3, 8, w), "labels": torch.zeros(8, w)} for w in (8, 9)]
    with pytest.raises(DataError, match="leaves pictures at unlike sizes"):
        task.collate(rows)


@pytest.mark.parametrize("crop", [(32, 32), (24, 80)])
def test_what_a_processor_cuts_off_is_no_class(tmp_path, crop):
    """The mask lies over the middle that the model saw (or over all of it, where the cut is larger
    than the picture), and is 255 around it."""
    from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

    processor = BeitImageProcessorPil(
        size={"height": 64, "width": 64}, do_center_crop=True, image_mean=[0.5] * 3,
        image_std=[0.5] * 3, crop_size={"height": crop[0], "width": crop[1]})
    task = learnt(shapes(tmp_path / "a", 3), processor=processor)

    class Bright(torch.nn.Module):
        def forward(self, pixel_values):
            x = pixel_values.mean(1)
            return transformers.modeling_outputs.SemanticSegmenterOutput(
                logits=torch.stack([0 * x, -x, x], 1))

    picture = np.zeros((96, 128, 3), np.uint8)
    picture[:, 80:] = 255
    row = {"image": Image.fromarray(picture)}
    told = task.answer(Bright(), row, 0)
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(told["mask"]))))
    assert mask.shape == (96, 128)
    want = np.where(picture[..., 0] > 0, 2, 1)
    tall = round(96 * (64 - crop[0]) / 128)                     # rows that are cut off above
    want[:tall] = want[96 - tall:] = 255
    if crop[1] < 64:
        want[:, :32] = want[:, 96:] = 255
    assert np.mean(mask == want) > 0.98
    assert (mask[want == 255] == 255).all() and (mask[want != 255] != 255).all()
    assert sum(told["shares"].values()) == pytest.approx(1)


def test_what_describes_rows_names_a_picture_that_breaks_off(tmp_path):
    """Before training: the digest that tells other data, the rows that are shown."""
    root = shapes(tmp_path / "a", 3)
    data = read(root, validation=0)
    whole = (root / "images" / "0.jpg").read_bytes()
    (root / "images" / "0.jpg").write_bytes(whole[:-40])
    for look in (data.fingerprint, data.samples):
        with pytest.raises(DataError, match="0.jpg: the picture cannot be read: .*truncated"):
            look()
